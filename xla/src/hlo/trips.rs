//! How often the body of a loop runs.
//!
//! The compilers for CPU and CUDA note it; for TPU it is read off the loop: a counter that starts at a constant, is
//! renewed by adding a constant, and is compared with a constant.

use super::cost::number_after;
use super::module::{Instruction, Module};
use super::origin::{Evaluator, Known, Value};
use std::collections::HashMap;

impl Module {
    /// How often the body of the loop at a place of a computation runs; `None` where it depends on data, and for
    /// instructions that are no loops.
    pub fn trip_count(&self, computation: usize, instruction: usize) -> Option<u64> {
        self.trips.get(&(computation, instruction)).copied()
    }
}

/// The trips of all loops, by the places of computation and instruction.
pub(super) fn find(module: &Module) -> HashMap<(usize, usize), u64> {
    let (mut trips, mut known) = (HashMap::new(), Known::new());
    // Callers stand after what they call: going backwards, an outer loop's constants are known to the inner one.
    for (c, computation) in module.computations.iter().enumerate().rev() {
        for (i, instruction) in computation.instructions.iter().enumerate() {
            if instruction.opcode != "while" {
                continue;
            }
            let noted = number_after(&instruction.backend_config, "\"known_trip_count\":{\"n\":");
            let read = count(module, &mut known, c, instruction);
            if let Some(count) = noted.or(read) {
                trips.insert((c, i), count);
            }
        }
    }
    trips
}

/// The trips of a loop in computation `c`. Adds to `known` what its body and condition may rely on.
fn count(module: &Module, known: &mut Known, c: usize, instruction: &Instruction) -> Option<u64> {
    let (&[body, condition], &[start]) = (&instruction.calls[..], &instruction.operands[..]) else { return None };
    let width = instruction.shape.parts().len();
    let element = |c: usize, place: usize, i: usize, known: &Known| {
        let mut at = Evaluator::new(module, known, c);
        let tuple = at.through_copies(place);
        let tuple = &module.computations[c].instructions[tuple];
        let part = *tuple.operands.get(i).filter(|_| tuple.opcode == "tuple")?;
        at.value(part)
    };
    let root = module.computations[body].root;
    let starts: Vec<_> = (0..width).map(|i| element(c, start, i, known)).collect();
    let nexts: Vec<_> = (0..width).map(|i| element(body, root, i, known)).collect();
    let constant = |i: usize| match (starts[i], nexts[i]) {
        (Some(Value::Constant(v)), Some(Value::Element(j, 0))) if i == j => Some(v),
        _ => None,
    };
    // One computation may be the body of several loops: then nothing is known of its values.
    let shared = known.contains_key(&body) || known.contains_key(&condition);
    let constants: Vec<_> = (0..width).map(|i| if shared { None } else { constant(i) }).collect();
    known.insert(body, constants.clone());
    known.insert(condition, constants);

    let mut test = Evaluator::new(module, known, condition);
    let (direction, left, right) = test.comparison(module.computations[condition].root)?;
    let direction = Direction::named(direction)?;
    let (counter, shift, direction, limit) = match (left, right) {
        (Value::Element(i, shift), Value::Constant(limit)) => (i, shift, direction, limit),
        (Value::Constant(limit), Value::Element(i, shift)) => (i, shift, direction.swapped(), limit),
        _ => return None,
    };
    let (Some(Value::Constant(start)), Some(Value::Element(same, step))) = (*starts.get(counter)?, nexts[counter])
    else {
        return None;
    };
    if same != counter {
        return None;
    }
    direction.trips(i128::from(start) + i128::from(shift), i128::from(step), i128::from(limit))
}

/// A comparison of a counter with a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    NotEqual,
}

impl Direction {
    fn named(name: &str) -> Option<Direction> {
        Some(match name {
            "LT" => Direction::Less,
            "LE" => Direction::LessOrEqual,
            "GT" => Direction::Greater,
            "GE" => Direction::GreaterOrEqual,
            "NE" => Direction::NotEqual,
            _ => return None,
        })
    }

    /// The same comparison with its sides exchanged.
    fn swapped(self) -> Direction {
        match self {
            Direction::Less => Direction::Greater,
            Direction::LessOrEqual => Direction::GreaterOrEqual,
            Direction::Greater => Direction::Less,
            Direction::GreaterOrEqual => Direction::LessOrEqual,
            Direction::NotEqual => Direction::NotEqual,
        }
    }

    /// How often `start`, `start + step`, … meets the comparison with `limit` before it first fails. `None` where it
    /// does not fail.
    fn trips(self, start: i128, step: i128, limit: i128) -> Option<u64> {
        let (distance, step) = match self {
            Direction::Less => (limit - start, step),
            Direction::LessOrEqual => (limit - start + 1, step),
            Direction::Greater => (start - limit, -step),
            Direction::GreaterOrEqual => (start - limit + 1, -step),
            Direction::NotEqual if limit < start => (start - limit, -step),
            Direction::NotEqual => (limit - start, step),
        };
        if distance <= 0 {
            return Some(0);
        }
        if step <= 0 || (self == Direction::NotEqual && distance % step != 0) {
            return None;
        }
        u64::try_from((distance + step - 1) / step).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// The trips of the only loop of the last computation.
    fn trips(module: &Module) -> Option<u64> {
        let place = module.entry().instructions.iter().position(|i| i.opcode == "while").unwrap();
        module.trip_count(module.entry, place)
    }

    #[test]
    fn a_noted_count_is_believed() {
        let [body, condition] = counted_loop(10, 0, 7, &[]);
        let [zero, array, state, run] = run_loop(900, 10);
        let run = run.bytes(43, "{\"known_trip_count\":{\"n\":\"12\"},\"known_init_step\":{\"init\":\"0\"}}");
        let entry = computation(1, 903, &[zero, array, state, run]);
        assert_eq!(trips(&parse(&module(1, &[body, condition, entry]))), Some(12));
    }

    #[test]
    fn a_counter_is_followed_through_copies_and_fusions() {
        // The body adds in a fusion of its counter's copy, the condition compares in a fusion.
        let add = computation(
            2,
            22,
            &[
                instruction(20, "parameter", array(S32, &[]), &[]).int(9, 0),
                constant(21, 3),
                instruction(22, "add", array(S32, &[]), &[21, 20]),
            ],
        );
        let compare = computation(
            3,
            32,
            &[
                instruction(30, "parameter", array(S32, &[]), &[]).int(9, 1),
                instruction(31, "parameter", array(S32, &[]), &[]).int(9, 0),
                instruction(32, "compare", array(1, &[]), &[30, 31]).bytes(63, "GE"),
            ],
        );
        let state = || tuple(&[array(S32, &[])]);
        let body = computation(
            4,
            44,
            &[
                instruction(40, "parameter", state(), &[]),
                instruction(41, "get-tuple-element", array(S32, &[]), &[40]).int(13, 0),
                instruction(42, "copy", array(S32, &[]), &[41]),
                instruction(43, "fusion", array(S32, &[]), &[42]).packed(38, &[2]),
                instruction(44, "tuple", state(), &[43]),
            ],
        );
        let condition = computation(
            5,
            53,
            &[
                instruction(50, "parameter", state(), &[]),
                instruction(51, "get-tuple-element", array(S32, &[]), &[50]).int(13, 0),
                constant(52, 10),
                instruction(53, "fusion", array(1, &[]), &[51, 52]).packed(38, &[3]),
            ],
        );
        let entry = computation(
            6,
            63,
            &[
                constant(60, -2),
                instruction(61, "copy", array(S32, &[]), &[60]),
                instruction(62, "tuple", state(), &[61]),
                instruction(63, "while", state(), &[62]).packed(38, &[4, 5]),
            ],
        );
        // 10 >= i: -2, 1, 4, 7, 10.
        assert_eq!(trips(&parse(&module(6, &[add, compare, body, condition, entry]))), Some(5));
    }

    #[test]
    fn a_limit_that_is_carried_unchanged_is_known_to_inner_loops() {
        // Outer and inner loop compare with element 1, which only the start of the outer loop sets.
        let state = || tuple(&[array(S32, &[]), array(S32, &[])]);
        let element = |id, of, index| instruction(id, "get-tuple-element", array(S32, &[]), &[of]).int(13, index);
        let condition = |c: i64| {
            let id = c * 100;
            let compare = instruction(id + 3, "compare", array(1, &[]), &[id + 1, id + 2]).bytes(63, "LT");
            let parameter = instruction(id, "parameter", state(), &[]);
            computation(c, id + 3, &[parameter, element(id + 1, id, 0), element(id + 2, id, 1), compare])
        };
        let body = |c: i64, inside: &[Message]| {
            let id = c * 100;
            let mut list = vec![
                instruction(id, "parameter", state(), &[]),
                element(id + 1, id, 0),
                element(id + 2, id, 1),
                constant(id + 3, 1),
                instruction(id + 4, "add", array(S32, &[]), &[id + 1, id + 3]),
            ];
            list.extend(inside.iter().cloned());
            list.push(instruction(id + 5, "tuple", state(), &[id + 4, id + 2]));
            computation(c, id + 5, &list)
        };
        let inner = [
            constant(900, 2),
            instruction(901, "tuple", state(), &[900, 402]),
            instruction(902, "while", state(), &[901]).packed(38, &[2, 3]),
        ];
        let start = |limit: Message| {
            let start = instruction(602, "tuple", state(), &[600, 601]);
            let run = instruction(603, "while", state(), &[602]).packed(38, &[4, 5]);
            computation(6, 603, &[constant(600, 0), limit, start, run])
        };
        let program = |limit| module(6, &[body(2, &[]), condition(3), body(4, &inner), condition(5), start(limit)]);
        let known = parse(&program(constant(601, 9)));
        assert_eq!(trips(&known), Some(9));
        let place = known.computations[2].instructions.iter().position(|i| i.opcode == "while").unwrap();
        assert_eq!(known.trip_count(2, place), Some(7));
        // A limit that comes from outside is not known.
        let dynamic = parse(&program(instruction(601, "parameter", array(S32, &[]), &[])));
        assert_eq!((trips(&dynamic), dynamic.trip_count(2, place)), (None, None));
    }

    #[test]
    fn a_circle_of_copies_ends() {
        let [body, condition] = counted_loop(10, 1, 7, &[]);
        let state = loop_state();
        let entry = computation(
            1,
            902,
            &[
                instruction(900, "copy", state.clone(), &[901]),
                instruction(901, "copy", state.clone(), &[900]),
                instruction(902, "while", state, &[900]).packed(38, &[10, 11]),
            ],
        );
        assert_eq!(trips(&parse(&module(1, &[body, condition, entry]))), None);
    }

    #[test]
    fn trips_of_each_comparison() {
        use Direction::*;
        for (direction, start, step, limit, wanted) in [
            (Less, 0, 1, 7, Some(7)),
            (Less, 0, 3, 7, Some(3)),
            (Less, 7, 1, 7, Some(0)),
            (LessOrEqual, 0, 1, 7, Some(8)),
            (Greater, 7, -1, 0, Some(7)),
            (GreaterOrEqual, 7, -2, 0, Some(4)),
            (NotEqual, 0, 1, 7, Some(7)),
            (NotEqual, 7, -1, 0, Some(7)),
            (NotEqual, 3, 1, 3, Some(0)),
            // These would not end, or only when the counter overflows.
            (NotEqual, 0, 2, 7, None),
            (Less, 0, 0, 7, None),
            (Less, 0, -1, 7, None),
        ] {
            assert_eq!(direction.trips(start, step, limit), wanted, "{direction:?} {start} {step} {limit}");
            let mirrored = direction.swapped().trips(-start, -step, -limit);
            assert_eq!(mirrored, wanted, "mirrored: {direction:?} {start} {step} {limit}");
        }
    }
}
