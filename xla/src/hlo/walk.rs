//! Which computations run, and how often, in one run of the program.

use super::module::{Instruction, Module};
use std::collections::HashMap;

/// What is followed from an instruction into the computations it calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Follow {
    /// Loops, branches, calls, and what runs beside the program.
    Calls,
    /// Those and the insides of fusions.
    Fusions,
}

impl Module {
    /// How often each computation runs, by its place, where every branch is taken and loops without known trips run
    /// once; 0 for those that do not run.
    pub(super) fn reach(&self, follow: Follow) -> Vec<u64> {
        let mut times = vec![0u64; self.computations.len()];
        times[self.entry] = 1;
        // Callers stand after what they call: going backwards, a caller's number is final when it is asked for.
        for c in (0..self.computations.len()).rev() {
            let here = times[c];
            if here == 0 {
                continue;
            }
            for (i, instruction) in self.computations[c].instructions.iter().enumerate() {
                let each = match (instruction.opcode.as_str(), follow) {
                    ("while", _) => self.trip_count(c, i).unwrap_or(1),
                    ("call" | "conditional" | "async-start", _) | ("fusion", Follow::Fusions) => 1,
                    _ => 0,
                };
                for &callee in &instruction.calls {
                    times[callee] = times[callee].saturating_add(here.saturating_mul(each));
                }
            }
        }
        times
    }

    /// The instructions that run, each with how often it does.
    pub(super) fn executed(&self, follow: Follow) -> impl Iterator<Item = (&Instruction, u64)> {
        let with = self.computations.iter().zip(self.reach(follow)).filter(|(_, times)| *times > 0);
        with.flat_map(|(computation, times)| computation.instructions.iter().map(move |i| (i, times)))
    }

    /// The fusion or start that each such computation is the inside of.
    pub(super) fn wrappers(&self) -> HashMap<usize, &Instruction> {
        let all = self.computations.iter().flat_map(|c| &c.instructions);
        let wrappers = all.filter(|i| matches!(i.opcode.as_str(), "fusion" | "async-start"));
        wrappers.flat_map(|wrapper| wrapper.calls.iter().map(move |&callee| (callee, wrapper))).collect()
    }
}
