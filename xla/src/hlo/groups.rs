//! How many devices take part in one group of a collective: the proto has four ways to say it.

use super::error::HloError;
use super::wire::{Cursor, Field};

/// What an instruction says about the devices of a collective.
#[derive(Default)]
pub(super) struct Groups {
    size: Option<u64>,
    pairs: u64,
}

impl Groups {
    /// Takes a field of `HloInstructionProto` that is about groups; others are ignored.
    pub(super) fn field(&mut self, cursor: &Cursor<'_>, field: u64, value: Field<'_>) -> Result<(), HloError> {
        let size = match field {
            // The groups listed one by one: the first tells the size of all.
            49 if self.size.is_none() => group(cursor.bytes(field, value)?)?,
            52 => {
                self.pairs += 1;
                return Ok(());
            }
            87 => device_list(cursor.bytes(field, value)?)?,
            92 => iota(cursor.bytes(field, value)?)?,
            93 => mesh_axes(cursor.bytes(field, value)?)?,
            _ => return Ok(()),
        };
        self.size = size.or(self.size);
        Ok(())
    }

    /// Devices of one group, or source-target pairs of a permutation; `None` where all devices are one group.
    pub(super) fn size(&self) -> Option<u64> {
        if self.pairs > 0 { Some(self.pairs) } else { self.size }
    }
}

/// `ReplicaGroup`; an empty one stands for all devices.
fn group(bytes: &[u8]) -> Result<Option<u64>, HloError> {
    let (mut cursor, mut ids) = (Cursor::new("ReplicaGroup", bytes), Vec::new());
    while let Some((field, value)) = cursor.next()? {
        if field == 1 {
            cursor.ints(field, value, &mut ids)?;
        }
    }
    Ok(if ids.is_empty() { None } else { Some(ids.len() as u64) })
}

/// `CollectiveDeviceListProto`.
fn device_list(bytes: &[u8]) -> Result<Option<u64>, HloError> {
    let (mut cursor, mut size) = (Cursor::new("CollectiveDeviceListProto", bytes), None);
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 if size.is_none() => size = group(cursor.bytes(field, value)?)?,
            2 => size = iota(cursor.bytes(field, value)?)?,
            _ => {}
        }
    }
    Ok(size)
}

/// `IotaReplicaGroupListProto`.
fn iota(bytes: &[u8]) -> Result<Option<u64>, HloError> {
    let (mut cursor, mut size) = (Cursor::new("IotaReplicaGroupListProto", bytes), None);
    while let Some((field, value)) = cursor.next()? {
        if field == 2 {
            size = u64::try_from(cursor.int(field, value)?).ok();
        }
    }
    Ok(size)
}

/// `MeshAxesReplicaGroupListProto`: the group spans some axes of a mesh, or parts of them.
fn mesh_axes(bytes: &[u8]) -> Result<Option<u64>, HloError> {
    let mut cursor = Cursor::new("MeshAxesReplicaGroupListProto", bytes);
    let (mut sizes, mut axes) = (Vec::new(), Vec::new());
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => sizes = mesh(cursor.bytes(field, value)?)?,
            2 => axes.push(axis(cursor.bytes(field, value)?)?),
            _ => {}
        }
    }
    let size = |&(index, part): &(u64, Option<u64>)| part.or_else(|| sizes.get(usize::try_from(index).ok()?).copied());
    Ok(axes.iter().try_fold(1u64, |n, axis| Some(n.saturating_mul(size(axis)?))))
}

/// `MeshProto`: the sizes of its axes.
fn mesh(bytes: &[u8]) -> Result<Vec<u64>, HloError> {
    let (mut cursor, mut sizes) = (Cursor::new("MeshProto", bytes), Vec::new());
    while let Some((field, value)) = cursor.next()? {
        if field == 1 {
            let mut axis = Cursor::new("MeshAxis", cursor.bytes(field, value)?);
            let mut size = 0;
            while let Some((field, value)) = axis.next()? {
                if field == 2 {
                    size = axis.int(field, value)?;
                }
            }
            sizes.push(u64::try_from(size).unwrap_or(0));
        }
    }
    Ok(sizes)
}

/// `AxisRefProto`: the axis, and the size of the part of it where it is a part.
fn axis(bytes: &[u8]) -> Result<(u64, Option<u64>), HloError> {
    let (mut cursor, mut index, mut part) = (Cursor::new("AxisRefProto", bytes), 0, None);
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => index = cursor.int(field, value)? as u64,
            2 => {
                let mut sub = Cursor::new("SubAxis", cursor.bytes(field, value)?);
                while let Some((field, value)) = sub.next()? {
                    if field == 2 {
                        part = u64::try_from(sub.int(field, value)?).ok();
                    }
                }
            }
            _ => {}
        }
    }
    Ok((index, part))
}
