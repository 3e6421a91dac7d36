//! Rows of an (N, K) weight: the embedding of tokens.

use super::element::{Element, elements};
use super::{Linear, Order, Weight};
use crate::scratch::counts;

/// Outputs `ids` of an (N, K) weight as f32 (ids.len(), K), packed weights too; an id that is not below N is taken as
/// the nearest that is, as StableHLO's gather does.
///
/// # Panics
/// If a slice has not the length that the weight asks for, a packed weight its shapes; if the weight is (K, N), or
/// has no outputs though there are ids.
pub fn take_rows(table: &Linear, ids: &[i32], out: &mut [f32]) {
    let (k, n) = (table.k, table.n);
    table.check();
    assert!(counts(out.len(), &[ids.len(), k]), "{} rows × {k} required, found {} elements", ids.len(), out.len());
    assert!(n > 0 || ids.is_empty(), "a weight with outputs required, found none");
    for (&id, out) in ids.iter().zip(out.chunks_mut(k.max(1))) {
        let id = (id.max(0) as usize).min(n - 1);
        match &table.weight {
            Weight::Packed(packed) => packed.unpack_output(k, id, out),
            Weight::Rows { order: Order::Kn, .. } => panic!("rows of an (N, K) weight required, found (K, N)"),
            Weight::Rows { values, .. } => elements!(values, |w| widen(&w[id * k..], out)),
        }
    }
}

fn widen<T: Element>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = from.into());
}
