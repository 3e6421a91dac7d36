//! Programs made by hand, for the tests of this module.

use super::module::Module;

/// A message being written.
#[derive(Clone, Default)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(super) fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    pub(super) fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    pub(super) fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, value.0)
    }

    pub(super) fn packed(self, field: u64, values: &[i64]) -> Self {
        let mut packed = Message::default();
        values.iter().for_each(|v| packed.varint(*v as u64));
        self.message(field, packed)
    }
}

pub(super) fn message() -> Message {
    Message::default()
}

pub(super) const S32: i64 = 4;
pub(super) const F32: i64 = 11;
pub(super) const BF16: i64 = 16;

/// The type of an array in a memory, laid out row by row.
pub(super) fn array_in(element: i64, dims: &[i64], space: i64) -> Message {
    let order: Vec<i64> = (0..dims.len() as i64).rev().collect();
    let layout = message().packed(1, &order).int(8, space);
    message().int(2, element).packed(3, dims).message(5, layout)
}

pub(super) fn array(element: i64, dims: &[i64]) -> Message {
    array_in(element, dims, 0)
}

pub(super) fn tuple(parts: &[Message]) -> Message {
    parts.iter().fold(message().int(2, 13), |m, part| m.message(4, part.clone()))
}

/// An instruction; further fields are added to it.
pub(super) fn instruction(id: i64, opcode: &str, shape: Message, operands: &[i64]) -> Message {
    let name = format!("{opcode}.{id}");
    message().bytes(1, name).bytes(2, opcode).message(3, shape).int(35, id).packed(36, operands)
}

/// A constant that is one `s32`.
pub(super) fn constant(id: i64, value: i64) -> Message {
    let literal = message().message(1, array(S32, &[])).packed(4, &[value]);
    instruction(id, "constant", array(S32, &[]), &[]).message(8, literal)
}

/// An instruction that the TPU compiler estimates at this many cycles.
pub(super) fn estimated(id: i64, opcode: &str, cycles: u64) -> Message {
    let config = format!("{{\"window_config\":{{\"estimated_cycles\":\"{cycles}\"}}}}");
    instruction(id, opcode, array(F32, &[8]), &[]).bytes(43, config)
}

/// A computation whose root is its last instruction, which has the id `root`.
pub(super) fn computation(id: i64, root: i64, instructions: &[Message]) -> Message {
    let head = message().bytes(1, format!("computation.{id}")).int(5, id).int(6, root);
    instructions.iter().fold(head, |m, i| m.message(2, i.clone()))
}

/// A module whose last computation, which has the id `entry`, runs first.
pub(super) fn module(entry: i64, computations: &[Message]) -> Message {
    let head = message().bytes(1, "made by hand").int(6, entry);
    computations.iter().fold(head, |m, c| m.message(3, c.clone()))
}

pub(super) fn parse(module: &Message) -> Module {
    Module::parse("hlo", &module.0).unwrap_or_else(|e| panic!("{e}"))
}

/// The body and condition (ids `first` and `first + 1`) of a loop over (counter, array): the counter grows by `step`
/// as long as it is less than `limit`; `inside` stands in the body. Ids from `100 * first` on are used.
pub(super) fn counted_loop(first: i64, step: i64, limit: i64, inside: &[Message]) -> [Message; 2] {
    let (state, id) = (loop_state(), 100 * first);
    let mut body = vec![
        instruction(id, "parameter", state.clone(), &[]),
        instruction(id + 1, "get-tuple-element", array(S32, &[]), &[id]).int(13, 0),
        instruction(id + 2, "get-tuple-element", array(F32, &[8]), &[id]).int(13, 1),
        constant(id + 3, step),
        instruction(id + 4, "add", array(S32, &[]), &[id + 1, id + 3]),
    ];
    body.extend(inside.iter().cloned());
    body.push(instruction(id + 5, "tuple", state.clone(), &[id + 4, id + 2]));
    let condition = [
        instruction(id + 10, "parameter", state, &[]),
        instruction(id + 11, "get-tuple-element", array(S32, &[]), &[id + 10]).int(13, 0),
        constant(id + 12, limit),
        instruction(id + 13, "compare", array(1, &[]), &[id + 11, id + 12]).bytes(63, "LT"),
    ];
    [computation(first, id + 5, &body), computation(first + 1, id + 13, &condition)]
}

pub(super) fn loop_state() -> Message {
    tuple(&[array(S32, &[]), array(F32, &[8])])
}

/// A loop with the body `first` and the condition `first + 1` that starts at 0, with ids from `id` to `id + 3`.
pub(super) fn run_loop(id: i64, first: i64) -> [Message; 4] {
    [
        constant(id, 0),
        instruction(id + 1, "parameter", array(F32, &[8]), &[]).int(9, id),
        instruction(id + 2, "tuple", loop_state(), &[id, id + 1]),
        instruction(id + 3, "while", loop_state(), &[id + 2]).packed(38, &[first, first + 1]),
    ]
}
