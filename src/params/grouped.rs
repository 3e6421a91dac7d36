//! Integer codes whose axes are those of the floats: what meshes and accelerators multiply with. XLA makes floats of them inside the
//! product that reads them, so that memory sees the integers only.

use xla::DType;
use xla::graph::{Platform, Tensor, einsum_as};

/// Codes with a scale, and maybe a minimum, for each group of terms along one axis.
#[derive(Clone, Debug)]
pub struct Grouped {
    /// The shape as floats.
    pub shape: Vec<usize>,
    /// The axis of the groups. Axes behind it are one in the arrays: XLA makes floats of a matrix inside of a product, of more axes
    /// beside it.
    pub axis: usize,
    /// Terms of a group.
    pub group: usize,
    /// The type of the products.
    pub dtype: DType,
    /// Codes; scales and, where there are any, minima, of the same shape but for `axis`, which has the groups.
    pub arrays: Vec<Tensor>,
}

/// Rows up to which a GPU sums products itself: more read the codes as often.
const SUMMED_ROWS: usize = 4;

impl Grouped {
    /// scale · code, plus the minimum where there is one, computed in f32: in the type of the products, with all axes.
    #[track_caller]
    pub fn float(&self) -> Tensor {
        self.matrix().reshape(&self.shape)
    }

    /// The same with the axes of the arrays.
    #[track_caller]
    fn matrix(&self) -> Tensor {
        let [codes, scales, mins @ ..] = &self.arrays[..] else { unreachable!("codes and scales") };
        let mut split = codes.shape().to_vec();
        split.splice(self.axis..=self.axis, [scales.dim(self.axis as isize), self.group]);
        let kept: Vec<usize> = (0..split.len()).filter(|&axis| axis != self.axis + 1).collect();
        let wide = |x: &Tensor| x.cast(DType::F32).broadcast(&split, &kept).reshape(codes.shape());
        let values = codes.cast(DType::F32) * wide(scales);
        let values = if let [mins] = mins { values + wide(mins) } else { values };
        values.cast(self.dtype)
    }

    /// `einsum(equation, x, self)` in f32. What is behind the axis of the groups stands last in the result too.
    ///
    /// On a TPU that axis is cut into powers of two, whose products are added, unless devices share it: libtpu makes floats inside of
    /// a product of as many terms, and of any other number beside it, which takes six times the cycles.
    #[track_caller]
    pub fn product(&self, equation: &str, x: &Tensor, shared: bool) -> Tensor {
        let joined = self.shape.len() - self.arrays[0].rank();
        let without = |letters: &str| letters[..letters.len() - joined].to_string();
        let (operands, result) = equation.split_once("->").unwrap_or((equation, ""));
        let (left, right) = operands.split_once(',').unwrap_or((operands, ""));
        let y = match x.graph().platform() {
            Platform::Gpu if left.starts_with("BS") && x.dim(0) * x.dim(1) <= SUMMED_ROWS => {
                self.summed(left, &without(right), x)
            }
            _ => {
                let equation = format!("{left},{}->{}", without(right), without(result));
                let of_x = left.find(&right[self.axis..=self.axis]).unwrap_or(0) as isize;
                let mut start = 0;
                let products = self.lengths(shared).into_iter().map(|length| {
                    let part = self.part(start, length);
                    let product = einsum_as(&equation, &x.narrow(of_x, start, length), &part.matrix(), DType::F32);
                    start += length;
                    product
                });
                products.reduce(|a, b| a + b).unwrap_or_else(|| x.clone())
            }
        };
        if joined == 0 {
            return y;
        }
        // Else libtpu moves the reshape into the product, which then has more axes.
        let y = if on_tpu(&y) { y.graph().optimization_barrier(&[&y]).remove(0) } else { y };
        y.reshape(&[&y.shape()[..y.rank() - 1], &self.shape[self.axis + 1..]].concat())
    }

    /// `x` (B, S, …) times the matrix, whose axes are `right`, as a sum of products: where rows are few, XLA makes one program of it on a
    /// GPU that reads the codes, while a dot reads floats, which are written before.
    #[track_caller]
    fn summed(&self, left: &str, right: &str, x: &Tensor) -> Tensor {
        let matrix = self.matrix().cast(DType::F32);
        let summed: Vec<usize> = (0..right.len()).filter(|&axis| left.contains(&right[axis..=axis])).collect();
        let of_x: Vec<usize> = [0, 1].into_iter().chain(summed.iter().map(|axis| axis + 2)).collect();
        let of_matrix: Vec<usize> = (2..right.len() + 2).collect();
        let all = [&x.shape()[..2], matrix.shape()].concat();
        let x = x.cast(DType::F32).broadcast(&all, &of_x);
        let axes: Vec<isize> = summed.iter().map(|&axis| axis as isize + 2).collect();
        (x * matrix.broadcast(&all, &of_matrix)).sum(&axes)
    }

    /// In what lengths the axis of the groups is cut for a product.
    fn lengths(&self, shared: bool) -> Vec<usize> {
        let n = self.shape[self.axis];
        match on_tpu(&self.arrays[0]) && !shared {
            true => (0..usize::BITS).rev().map(|bit| n & 1 << bit).filter(|&length| length > 0).collect(),
            false => vec![n],
        }
    }

    /// Terms `start..start + length` of the axis of the groups.
    #[track_caller]
    fn part(&self, start: usize, length: usize) -> Grouped {
        if length == self.shape[self.axis] {
            return self.clone();
        }
        let by = |i: usize| if i == 0 { 1 } else { self.group };
        let arrays = self.arrays.iter().enumerate();
        let arrays = arrays.map(|(i, x)| x.narrow(self.axis as isize, start / by(i), length / by(i)));
        self.with_arrays(arrays.collect())
    }

    /// The same with the arrays that `f` makes of these, maybe parts of them where no axes are joined.
    pub fn each(&self, f: impl FnMut(&Tensor) -> Tensor) -> Grouped {
        self.with_arrays(self.arrays.iter().map(f).collect())
    }

    fn with_arrays(&self, arrays: Vec<Tensor>) -> Grouped {
        let joined = arrays[0].rank() < self.shape.len();
        let behind = if joined { &self.shape } else { arrays[0].shape() };
        let shape = [&arrays[0].shape()[..=self.axis], &behind[self.axis + 1..]].concat();
        Grouped { arrays, shape, ..self.clone() }
    }

    /// Rows `ids` of the first axis, which is not that of the groups: the axes of `ids` stand for it.
    #[track_caller]
    pub fn take(&self, ids: &Tensor) -> Grouped {
        let axis = self.axis + ids.rank() - 1;
        Grouped { axis, ..self.clone() }.with_arrays(self.arrays.iter().map(|x| x.take(ids, 0)).collect())
    }
}

fn on_tpu(x: &Tensor) -> bool {
    x.graph().platform() == Platform::Tpu
}
