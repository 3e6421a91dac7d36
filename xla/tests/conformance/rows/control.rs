//! Functions, loops, branches and calls of handlers.

use ndarray::{arr0, array};
use xla::DType;
use xla::graph::Aval;
use xla::graph::Tensor;
use xla::graph::ops::custom_call::{Attr, CustomCall};

use super::Row;
use crate::case::Case;
use crate::ffi;

fn case_of_three(c: &mut Case, index: i32, wanted: f32) {
    let (i, x) = (c.arg(&arr0(index)), c.arg(&array![2f32, -2.0]));
    let g = c.g.clone();
    let branches: [&xla::graph::ops::control::Branch<'_>; 3] =
        [&|a: &[Tensor]| vec![&a[0] + 1.0], &|a: &[Tensor]| vec![-&a[0]], &|a: &[Tensor]| vec![&a[0] * &a[0] * 3.0]];
    let y = g.case(&i, &[&x], &branches);
    c.is(&y[0].narrow(0, 0, 1), &array![wanted]);
}

pub(super) const ROWS: &[Row] = &[
    ("call", |c| {
        let g = c.g.clone();
        let (x, y) = (c.arg(&array![1f32, 2.0, 3.0]), c.arg(&array![10i32]));
        let square = |x: &Tensor| g.call("square", &[x], |a| vec![&a[0] * &a[0]]).remove(0);
        let fourth = |x: &Tensor| g.call("fourth", &[x], |a| vec![square(&square(&a[0]))]).remove(0);
        c.is(&fourth(&x), &array![1f32, 16.0, 81.0]);
        c.is(&square(&fourth(&x)), &array![1f32, 256.0, 6561.0]);
        // The same name for another type is another function.
        c.is(&fourth(&y), &array![10000i32]);
        let two = g.call("both", &[&x, &y], |a| vec![a[1].clone(), -&a[0]]);
        c.is(&two[0], &array![10i32]);
        c.is(&two[1], &array![-1f32, -2.0, -3.0]);
    }),
    ("custom_vjp", |c| {
        let g = c.g.clone();
        let x = c.arg(&array![1f32, -2.0]);
        // A derivative that is not that of the function shows which of the two was taken.
        let forward = |a: &[Tensor]| (vec![a[0].square(), a[0].sum(&[0])], vec![-&a[0]]);
        let odd = |x: &Tensor| g.custom_vjp("odd", &[x], forward, |kept, ct| vec![Some(&kept[0] * &ct[0])]);
        let y = odd(&x);
        c.is(&y[0], &array![1f32, 4.0]);
        c.is(&y[1], &arr0(-1f32));
        let gradient = g.grad(&(&y[0] * 3.0).sum(&[0]), &[&x]).remove(0);
        c.is(&gradient, &array![-3f32, 6.0]);
        c.is(&odd(&gradient)[0], &array![9f32, 36.0]);
    }),
    ("while", |c| {
        let g = c.g.clone();
        let (n, x) = (c.arg(&arr0(5i32)), c.arg(&array![1f32, 3.0]));
        let step = |v: &[Tensor]| vec![&v[0] - 1, g.call("double", &[&v[1]], |a| vec![&a[0] + &a[0]]).remove(0)];
        let end = g.while_loop(&[&n, &x], |v| v[0].gt(0), step);
        c.is(&end[0], &arr0(0i32));
        c.is(&end[1], &array![32f32, 96.0]);
        let never = g.while_loop(&[&x], |_| g.scalar(false, DType::Pred), |v| vec![-&v[0]]);
        c.is(&never[0], &array![1f32, 3.0]);
    }),
    ("scan", |c| {
        let g = c.g.clone();
        let (h, w) = (c.arg(&array![1f32, 0.0]), c.arg(&array![2f32, 3.0]));
        let xs = c.arg(&array![[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]]);
        let (carry, stacks) = g.scan("sums", 3, &[&w], &[&h], &[&xs], |w, h, x| {
            let next = &h[0] + &x[0] * &w[0];
            (vec![next.clone()], vec![next.sum(&[0]), h[0].clone()])
        });
        c.is(&carry[0], &array![19f32, 36.0]);
        c.is(&stacks[0], &array![9f32, 27.0, 55.0]);
        c.is(&stacks[1], &array![[1f32, 0.0], [3.0, 6.0], [9.0, 18.0]]);
        let (none, stack) = g.scan("never", 0, &[], &[&h], &[], |_, h, _| (vec![-&h[0]], vec![h[0].clone()]));
        c.is(&none[0], &array![1f32, 0.0]);
        assert_eq!(stack[0].shape(), [0, 2]);
    }),
    ("case", |c| {
        for (index, wanted) in [(0, 3.0), (1, -2.0), (2, 12.0), (9, 12.0), (-1, 12.0)] {
            case_of_three(c, index, wanted);
        }
        let g = c.g.clone();
        let x = c.arg(&array![2f32, -2.0]);
        for (flag, wanted) in [(true, array![4f32, 0.0]), (false, array![-2f32, 2.0])] {
            let p = c.arg(&arr0(flag));
            let y = g.cond(&p, &[&x], |a| vec![&a[0] + 2.0, a[0].clone()], |a| vec![-&a[0], a[0].clone()]);
            c.is(&y[0], &wanted);
            c.is(&y[1], &array![2f32, -2.0]);
        }
        // A branch inside a loop: the numbers 5, 4, 3, 2, 1, of which the even ones are added.
        let (n, total) = (c.arg(&arr0(5i32)), c.arg(&arr0(0i32)));
        let body = |v: &[Tensor]| {
            let even = (&v[0] % 2).eq(0);
            let sum = g.cond(&even, &[&v[0], &v[1]], |a| vec![&a[0] + &a[1]], |a| vec![a[1].clone()]);
            vec![&v[0] - 1, sum[0].clone()]
        };
        let end = g.while_loop(&[&n, &total], |v| v[0].gt(0), body);
        c.is(&end[1], &arr0(6i32));
    }),
    ("optimization_barrier", |c| {
        let g = c.g.clone();
        let (x, y) = (c.arg(&array![1f32, 2.0]), c.arg(&array![3i8]));
        let out = g.optimization_barrier(&[&x.exp().log(), &y]);
        c.near(&out[0], &array![1.0, 2.0]);
        c.is(&out[1], &array![3i8]);
    }),
    ("custom_call", |c| {
        let x = c.arg(&array![[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let call = CustomCall::new(ffi::SCALE, vec![Aval::new(DType::F32, &[2, 3])]).attr("by", Attr::F32(0.5));
        let y = c.g.apply1(call, &[&x]);
        c.is(&(y + 1.0), &array![[1.5f32, 2.0, 2.5], [3.0, 3.5, 4.0]]);
        // Column by column: the handler sees the elements in that order.
        let call = CustomCall::new(ffi::FIRST_TWO, vec![Aval::new(DType::F32, &[2])]);
        let y = c.g.apply1(call.with_layouts(vec![vec![0, 1]], vec![vec![0]]), &[&x]);
        c.is(&y, &array![1f32, 4.0]);
        let call = CustomCall::new(ffi::FIRST_TWO, vec![Aval::new(DType::F32, &[2])]);
        let y = c.g.apply1(call, &[&x]);
        c.is(&y, &array![1f32, 2.0]);
    }),
];
