//! Where an integer of a loop comes from: a constant, or one of the loop's values.

use super::literal::Scalar;
use super::module::{Instruction, Module};
use std::collections::HashMap;

/// Instructions that are looked at for one value; those that matter here are a handful.
const MAX_STEPS: usize = 256;

/// What is known of a loop's values, by the place of the body or condition: the elements that keep one constant.
pub(super) type Known = HashMap<usize, Vec<Option<i64>>>;

/// What an integer of a loop is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// A number.
    Constant(i64),
    /// An element of the loop's values at the begin of a trip, plus a constant.
    Element(usize, i64),
}

impl Value {
    fn plus(self, other: Value) -> Option<Value> {
        match (self, other) {
            (Value::Constant(a), Value::Constant(b)) => Some(Value::Constant(a.checked_add(b)?)),
            (Value::Element(i, a), Value::Constant(b)) | (Value::Constant(b), Value::Element(i, a)) => {
                Some(Value::Element(i, a.checked_add(b)?))
            }
            _ => None,
        }
    }

    fn minus(self, other: Value) -> Option<Value> {
        match other {
            Value::Constant(b) => self.plus(Value::Constant(b.checked_neg()?)),
            Value::Element(..) => None,
        }
    }
}

/// Follows values back to where they come from, within one computation and the fusions it calls.
pub(super) struct Evaluator<'a> {
    module: &'a Module,
    known: &'a Known,
    c: usize,
    /// Instructions that may still be looked at: damaged programs have circles.
    steps: usize,
}

impl<'a> Evaluator<'a> {
    /// For values of computation `c`.
    pub(super) fn new(module: &'a Module, known: &'a Known, c: usize) -> Self {
        Evaluator { module, known, c, steps: MAX_STEPS }
    }

    fn step(&mut self) -> Option<()> {
        self.steps = self.steps.checked_sub(1)?;
        Some(())
    }

    fn instruction(&self, place: usize) -> &'a Instruction {
        &self.module.computations[self.c].instructions[place]
    }

    /// The instruction whose value this one only moves.
    pub(super) fn through_copies(&mut self, mut place: usize) -> usize {
        while let (true, &[from]) = (is_move(self.instruction(place)), &self.instruction(place).operands[..]) {
            if self.step().is_none() {
                break;
            }
            place = from;
        }
        place
    }

    /// The integer at a place.
    pub(super) fn value(&mut self, place: usize) -> Option<Value> {
        self.step()?;
        let place = self.through_copies(place);
        let instruction = self.instruction(place);
        match (instruction.opcode.as_str(), &instruction.operands[..]) {
            ("constant", _) => match instruction.scalar? {
                Scalar::Int(v) => Some(Value::Constant(v)),
                _ => None,
            },
            ("get-tuple-element", &[state]) => {
                let state = self.through_copies(state);
                let element = usize::try_from(instruction.tuple_index).ok()?;
                let (state, known) = (self.instruction(state), self.known.get(&self.c));
                match known.and_then(|known| *known.get(element)?) {
                    _ if state.opcode != "parameter" => None,
                    Some(constant) => Some(Value::Constant(constant)),
                    None => Some(Value::Element(element, 0)),
                }
            }
            ("add", &[a, b]) => self.value(a)?.plus(self.value(b)?),
            ("subtract", &[a, b]) => self.value(a)?.minus(self.value(b)?),
            ("fusion", operands) => {
                let (root, arguments) = self.fused(instruction, operands)?;
                match (root.opcode.as_str(), &arguments[..]) {
                    ("add", &[a, b]) => a?.plus(b?),
                    ("subtract", &[a, b]) => a?.minus(b?),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The comparison at a place, which may be a fusion of it: its direction and its two sides.
    pub(super) fn comparison(&mut self, place: usize) -> Option<(&'a str, Value, Value)> {
        self.step()?;
        let place = self.through_copies(place);
        let instruction = self.instruction(place);
        match (instruction.opcode.as_str(), &instruction.operands[..]) {
            ("compare", &[a, b]) => Some((instruction.comparison.as_str(), self.value(a)?, self.value(b)?)),
            ("fusion", operands) => {
                let (root, arguments) = self.fused(instruction, operands)?;
                let &[a, b] = &arguments[..] else { return None };
                Some((root.comparison.as_str(), a?, b?))
            }
            _ => None,
        }
    }

    /// The last instruction of a fusion with the values of its operands, which must be the fusion's own or constants.
    fn fused(&mut self, fusion: &Instruction, operands: &[usize]) -> Option<(&'a Instruction, Vec<Option<Value>>)> {
        let inside = &self.module.computations[*fusion.calls.first()?];
        let root = &inside.instructions[inside.root];
        let mut arguments = Vec::new();
        for &operand in root.operands.iter().take(2) {
            let operand = &inside.instructions[operand];
            arguments.push(match (operand.opcode.as_str(), operand.scalar) {
                ("parameter", _) => {
                    let number = usize::try_from(operand.parameter).ok()?;
                    operands.get(number).and_then(|place| self.value(*place))
                }
                ("constant", Some(Scalar::Int(v))) => Some(Value::Constant(v)),
                _ => None,
            });
        }
        Some((root, arguments))
    }
}

/// Instructions with one operand whose value is that operand's.
fn is_move(instruction: &Instruction) -> bool {
    matches!(instruction.opcode.as_str(), "copy" | "bitcast" | "copy-start" | "copy-done" | "optimization-barrier")
}
