//! Where the program moves data without computing: the places where a copy of a cache shows.

use super::module::{Instruction, Module};
use super::shape::Shape;
use super::walk::Follow;

/// One move of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataCopy {
    /// The instruction.
    pub name: String,
    /// Its operation.
    pub opcode: String,
    /// The name that the graph's author gave to what it computes.
    pub op_name: String,
    /// Bytes that are written.
    pub bytes: u64,
    /// Executions in one run of the program, where every branch is taken and loops without known trips run once.
    pub times: u64,
    /// True where it only takes data from one memory of the device into another: on TPU a weight on its way into
    /// vector memory, or a result on its way out. That is no waste, the data has to come in once.
    pub between_memories: bool,
}

impl Module {
    /// Copies, transposes and slices outside of fusions, and fusions of nothing else, that write at least
    /// `threshold` bytes; the largest total first.
    pub fn copies(&self, threshold: u64) -> Vec<DataCopy> {
        let mut copies: Vec<DataCopy> = Vec::new();
        for (computation, times) in self.computations.iter().zip(self.reach(Follow::Calls)) {
            if times == 0 {
                continue;
            }
            for instruction in &computation.instructions {
                let operand = |i: &usize| &computation.instructions[*i].shape;
                let operands: Vec<&Shape> = instruction.operands.iter().map(operand).collect();
                let Some((bytes, between_memories)) = self.moved(instruction, &operands) else { continue };
                if bytes >= threshold {
                    copies.push(DataCopy {
                        name: instruction.name.clone(),
                        opcode: instruction.opcode.clone(),
                        op_name: instruction.op_name.clone(),
                        bytes,
                        times,
                        between_memories,
                    });
                }
            }
        }
        let total = |copy: &DataCopy| copy.bytes.saturating_mul(copy.times);
        copies.sort_by(|a, b| total(b).cmp(&total(a)).then_with(|| a.name.cmp(&b.name)));
        copies
    }

    /// The bytes that an instruction moves and whether it does so between memories; `None` where it does anything else.
    fn moved(&self, instruction: &Instruction, operands: &[&Shape]) -> Option<(u64, bool)> {
        let output = match (instruction.opcode.as_str(), instruction.shape.parts()) {
            (opcode, _) if is_move(opcode) => &instruction.shape,
            // The tuple of a start: where it goes, where it comes from, and a flag.
            ("copy-start", [to, ..]) => to,
            ("fusion", _) if self.only_moves(instruction) => &instruction.shape,
            _ => return None,
        };
        let from = operands.first()?;
        let space = |shape: &Shape| shape.array().map(|array| array.memory_space);
        let order = |shape: &Shape| shape.array().map(|array| array.minor_to_major.clone());
        // What the compiler gives cycles is no mere transfer: it also changes the layout.
        let transfer = space(from) != space(output) && order(from) == order(output) && instruction.cycles().is_none();
        Some((output.bytes(), transfer))
    }

    /// True for a fusion that computes nothing.
    fn only_moves(&self, fusion: &Instruction) -> bool {
        let moves = |opcode: &str| {
            is_move(opcode) || matches!(opcode, "parameter" | "constant" | "bitcast" | "reshape" | "tuple")
        };
        let inside = fusion.calls.iter().flat_map(|&callee| &self.computations[callee].instructions);
        let mut opcodes = inside.map(|i| i.opcode.as_str()).peekable();
        opcodes.clone().any(is_move) && opcodes.peek().is_some() && opcodes.all(moves)
    }
}

fn is_move(opcode: &str) -> bool {
    matches!(opcode, "copy" | "transpose" | "slice" | "dynamic-slice")
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;

    fn copies(instructions: &[Message], threshold: u64) -> Vec<(String, u64, bool)> {
        let inside = computation(
            2,
            21,
            &[
                instruction(20, "parameter", array(F32, &[64]), &[]),
                instruction(21, "transpose", array(F32, &[64]), &[20]),
            ],
        );
        let computing = computation(
            3,
            31,
            &[
                instruction(30, "parameter", array(F32, &[64]), &[]),
                instruction(31, "negate", array(F32, &[64]), &[30]),
            ],
        );
        let root = 100 + instructions.len() as i64 - 1;
        let module = parse(&module(1, &[inside, computing, computation(1, root, instructions)]));
        module.copies(threshold).into_iter().map(|c| (c.name, c.bytes, c.between_memories)).collect()
    }

    #[test]
    fn copies_are_told_from_transfers_and_from_computation() {
        let list = [
            instruction(100, "parameter", array(F32, &[64]), &[]),
            instruction(101, "copy", array(F32, &[64]), &[100]),
            instruction(102, "copy", array_in(F32, &[64], 1), &[100]),
            instruction(103, "copy", array_in(F32, &[64], 1), &[100]).bytes(43, "{\"estimated_cycles\":\"9\"}"),
            instruction(104, "fusion", array(F32, &[64]), &[100]).packed(38, &[2]),
            instruction(105, "fusion", array(F32, &[64]), &[100]).packed(38, &[3]),
            instruction(106, "slice", array(F32, &[16]), &[100]),
            instruction(107, "negate", array(F32, &[64]), &[100]),
        ];
        let wanted =
            [("copy.101", 256, false), ("copy.102", 256, true), ("copy.103", 256, false), ("fusion.104", 256, false)];
        let wanted: Vec<_> =
            wanted.into_iter().map(|(name, bytes, between)| (name.to_owned(), bytes, between)).collect();
        assert_eq!(copies(&list, 256), wanted);
        assert_eq!(copies(&list, 64).last().unwrap(), &("slice.106".to_owned(), 64, false));
        assert_eq!(copies(&list, 257), []);
    }

    #[test]
    fn a_transfer_that_turns_the_axes_is_a_copy() {
        let turned = message().int(2, F32).packed(3, &[8, 8]).message(5, message().packed(1, &[0, 1]).int(8, 1));
        let list = [instruction(100, "parameter", array(F32, &[8, 8]), &[]), instruction(101, "copy", turned, &[100])];
        assert_eq!(copies(&list, 0), [("copy.101".to_owned(), 256, false)]);
    }
}
