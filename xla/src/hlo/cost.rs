//! What the TPU compiler expects a program to take, in cycles of one core.
//!
//! An estimate stands at most instructions that compute. There is none for collectives, for copies that run beside the
//! computation (weights on their way into vector memory), and for a few others: a step takes at least the larger of
//! this sum and the time that reading the weights takes.

use super::module::{Instruction, Module};
use super::walk::Follow;
use std::collections::BTreeMap;

/// The sum of the compiler's estimates over one run of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycles {
    /// Cycles of one run: loop bodies times their trips, the dearest branch of each choice.
    pub total: u64,
    /// Loops whose trips depend on data; their bodies are counted once.
    pub dynamic_loops: usize,
}

/// The estimate for one instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The instruction.
    pub name: String,
    /// Its operation.
    pub opcode: String,
    /// The name that the graph's author gave to what it computes.
    pub op_name: String,
    /// Cycles of one execution.
    pub cycles: u64,
    /// Executions in one run of the program, where every branch is taken and loops without known trips run once.
    pub times: u64,
}

impl Cost {
    /// Cycles of one run of the program.
    pub fn total(&self) -> u64 {
        self.cycles.saturating_mul(self.times)
    }
}

impl Instruction {
    /// The TPU compiler's estimate for one execution, in cycles; `None` where it made none.
    pub fn cycles(&self) -> Option<u64> {
        number_after(&self.backend_config, "\"estimated_cycles\":")
    }
}

impl Module {
    /// The sum of the compiler's estimates; `None` where the program carries none, as on CPU and CUDA.
    pub fn cycles(&self) -> Option<Cycles> {
        let mut estimated = false;
        let mut totals: Vec<u64> = Vec::with_capacity(self.computations.len());
        // Callees stand before their callers, so their totals are there when they are asked for.
        for (c, computation) in self.computations.iter().enumerate() {
            let mut total = 0u64;
            for (i, instruction) in computation.instructions.iter().enumerate() {
                let own = instruction.cycles();
                let called = || instruction.calls.iter().map(|callee| totals[*callee]);
                let below = match (instruction.opcode.as_str(), own) {
                    ("while", _) => {
                        let trips = self.trip_count(c, i).unwrap_or(1);
                        called().fold(0, u64::saturating_add).saturating_mul(trips)
                    }
                    ("conditional", _) => called().max().unwrap_or(0),
                    // An estimate of the caller covers what it calls.
                    ("call" | "async-start", None) => called().fold(0, u64::saturating_add),
                    _ => 0,
                };
                total = total.saturating_add(own.unwrap_or(0)).saturating_add(below);
            }
            totals.push(total);
        }
        let reach = self.reach(Follow::Calls);
        let mut dynamic_loops = 0;
        for (c, computation) in self.computations.iter().enumerate().filter(|(c, _)| reach[*c] > 0) {
            for (i, instruction) in computation.instructions.iter().enumerate() {
                estimated |= instruction.cycles().is_some();
                dynamic_loops += usize::from(instruction.opcode == "while" && self.trip_count(c, i).is_none());
            }
        }
        estimated.then(|| Cycles { total: totals[self.entry], dynamic_loops })
    }

    /// The estimates of all instructions that have one, the dearest first.
    pub fn costs(&self) -> Vec<Cost> {
        let mut costs: Vec<Cost> = Vec::new();
        for (instruction, times) in self.executed(Follow::Calls) {
            let Some(cycles) = instruction.cycles() else { continue };
            costs.push(Cost {
                name: instruction.name.clone(),
                opcode: instruction.opcode.clone(),
                op_name: instruction.op_name.clone(),
                cycles,
                times,
            });
        }
        costs.sort_by(|a, b| b.total().cmp(&a.total()).then_with(|| a.name.cmp(&b.name)));
        costs
    }

    /// Executions, by opcode, that the estimates leave out although they take time: collectives, and on TPU some
    /// scatters, sorts and calls of the compiler's own kernels. Values of one element are not counted.
    pub fn unestimated(&self) -> BTreeMap<&str, u64> {
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        let wrapped = self.wrappers();
        for (c, times) in self.reach(Follow::Calls).into_iter().enumerate() {
            if times == 0 || wrapped.contains_key(&c) {
                continue;
            }
            for instruction in &self.computations[c].instructions {
                let opcode = instruction.opcode.as_str();
                let small = instruction.shape.array().is_some_and(|array| array.elements() <= 1);
                // Pieces of a weight that came into vector memory one by one are seen as one array.
                let view = instruction.custom_call_target == "ConcatBitcast";
                let free = small || view || FREE.contains(&opcode) || opcode.ends_with("-done");
                if !free && instruction.cycles().is_none() {
                    let count = counts.entry(opcode).or_default();
                    *count = count.saturating_add(times);
                }
            }
        }
        counts
    }
}

/// Opcodes that take no time of their own, or run beside what is estimated.
const FREE: [&str; 16] = [
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "async-done",
    "copy-start",
    "copy-done",
    "after-all",
    "partition-id",
    "replica-id",
];

/// The number that stands after a piece of JSON text; the proto's 64-bit numbers are quoted there.
pub(super) fn number_after(text: &[u8], key: &str) -> Option<u64> {
    let at = text.windows(key.len()).position(|window| window == key.as_bytes())?;
    let rest = &text[at + key.len()..];
    let rest = rest.strip_prefix(b"\"").unwrap_or(rest);
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn cycles_of_loops_branches_and_calls() {
        let [body, condition] = counted_loop(10, 1, 7, &[estimated(950, "fusion", 1000)]);
        let branch = |id: i64, cycles| computation(id, id * 10, &[estimated(id * 10, "fusion", cycles)]);
        let mut entry = run_loop(970, 10).to_vec();
        let call = |id, opcode, callees: &[i64]| instruction(id, opcode, array(F32, &[8]), &[]).packed(38, callees);
        entry.push(call(980, "conditional", &[2, 3]));
        entry.push(call(981, "call", &[4]));
        entry.push(call(982, "call", &[4]));
        // What a fusion or a call has of its own covers what is inside.
        entry.push(estimated(983, "fusion", 5).packed(38, &[3]));
        entry.push(estimated(984, "call", 6).packed(38, &[3]));
        entry.push(instruction(985, "scatter", array(F32, &[8]), &[]));
        let parts = [body, condition, branch(2, 300), branch(3, 400), branch(4, 20), computation(1, 985, &entry)];
        let module = parse(&module(1, &parts));
        assert_eq!(module.cycles(), Some(Cycles { total: 7 * 1000 + 400 + 2 * 20 + 5 + 6, dynamic_loops: 0 }));
        let costs = module.costs();
        let shown: Vec<_> = costs.iter().map(|c| (c.name.as_str(), c.cycles, c.times)).collect();
        assert_eq!(shown[0], ("fusion.950", 1000, 7));
        assert_eq!(costs[0].total(), 7000);
        assert!(shown.contains(&("fusion.40", 20, 2)) && shown.contains(&("call.984", 6, 1)), "{shown:?}");
        assert_eq!(module.unestimated(), BTreeMap::from([("scatter", 1)]));
    }

    #[test]
    fn a_loop_without_known_trips_counts_once_and_is_told() {
        let [body, condition] = counted_loop(10, 0, 7, &[estimated(950, "fusion", 1000)]);
        let module = parse(&module(1, &[body, condition, computation(1, 973, &run_loop(970, 10))]));
        assert_eq!(module.cycles(), Some(Cycles { total: 1000, dynamic_loops: 1 }));
    }

    #[test]
    fn a_program_without_estimates_has_no_cycles() {
        let [body, condition] = counted_loop(10, 1, 7, &[]);
        let module = parse(&module(1, &[body, condition, computation(1, 973, &run_loop(970, 10))]));
        assert_eq!((module.cycles(), module.costs()), (None, Vec::new()));
    }

    #[test]
    fn numbers_are_found_with_and_without_quotes() {
        assert_eq!(number_after(b"{\"n\":\"7\"}", "\"n\":"), Some(7));
        assert_eq!(number_after(b"{\"n\":7}", "\"n\":"), Some(7));
        assert_eq!(number_after(b"{\"n\":\"-1\"}", "\"n\":"), None);
        assert_eq!(number_after(b"{\"n\":", "\"n\":"), None);
        assert_eq!(number_after(b"{}", "\"n\":"), None);
    }
}
