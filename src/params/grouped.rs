//! Integer codes whose axes are those of the floats: what meshes and accelerators multiply with. XLA makes floats of them inside the
//! product that reads them, so that memory sees the integers only.

use xla::DType;
use xla::graph::Tensor;

/// Codes with a scale, and maybe a minimum, for each group of terms along one axis.
#[derive(Clone, Debug)]
pub struct Grouped {
    /// The axis of the groups.
    pub axis: usize,
    /// Terms of a group.
    pub group: usize,
    /// The type of the products.
    pub dtype: DType,
    /// Codes, of the shape of the floats; scales and, where there are any, minima, of the same shape but for `axis`, which has the
    /// groups.
    pub arrays: Vec<Tensor>,
}

impl Grouped {
    /// scale · code, plus the minimum where there is one, computed in f32: in the shape of the codes and the type of the products.
    #[track_caller]
    pub fn float(&self) -> Tensor {
        let [codes, scales, mins @ ..] = &self.arrays[..] else { unreachable!("codes and scales") };
        let mut split = codes.shape().to_vec();
        split.splice(self.axis..=self.axis, [scales.dim(self.axis as isize), self.group]);
        let kept: Vec<usize> = (0..split.len()).filter(|&axis| axis != self.axis + 1).collect();
        let wide = |x: &Tensor| x.cast(DType::F32).broadcast(&split, &kept).reshape(codes.shape());
        let values = codes.cast(DType::F32) * wide(scales);
        let values = if let [mins] = mins { values + wide(mins) } else { values };
        values.cast(self.dtype)
    }

    /// The same with the arrays that `f` makes of these.
    pub fn each(&self, f: impl FnMut(&Tensor) -> Tensor) -> Grouped {
        Grouped { arrays: self.arrays.iter().map(f).collect(), ..self.clone() }
    }

    /// [`Weight::cut`](super::Weight::cut) of codes, scales and minima.
    #[track_caller]
    pub fn cut(
        &self,
        axis: usize,
        start: usize,
        n: usize,
        f: impl Fn(usize, &Tensor, &dyn Fn(&Tensor) -> Tensor) -> Tensor,
    ) -> Grouped {
        let one = |(i, x): (usize, &Tensor)| {
            let by = if i > 0 && axis == self.axis { self.group } else { 1 };
            f(i, x, &|x| x.narrow(axis as isize, start / by, n / by))
        };
        Grouped { arrays: self.arrays.iter().enumerate().map(one).collect(), ..self.clone() }
    }

    /// Rows `ids` of the first axis, which is not that of the groups: the axes of `ids` stand for it.
    #[track_caller]
    pub fn take(&self, ids: &Tensor) -> Grouped {
        Grouped { axis: self.axis + ids.rank() - 1, ..self.each(|x| x.take(ids, 0)) }
    }
}
