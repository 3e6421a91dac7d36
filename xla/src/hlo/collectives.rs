//! Where devices speak with each other, and how much they say.

use super::module::{Computation, Instruction, Module};
use super::walk::Follow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// What a collective does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum CollectiveKind {
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    CollectivePermute,
    CollectiveBroadcast,
}

impl CollectiveKind {
    const ALL: [(CollectiveKind, &'static str); 7] = [
        (CollectiveKind::AllReduce, "all-reduce"),
        (CollectiveKind::AllGather, "all-gather"),
        (CollectiveKind::ReduceScatter, "reduce-scatter"),
        (CollectiveKind::AllToAll, "all-to-all"),
        (CollectiveKind::AllToAll, "ragged-all-to-all"),
        (CollectiveKind::CollectivePermute, "collective-permute"),
        (CollectiveKind::CollectiveBroadcast, "collective-broadcast"),
    ];

    /// The kind of an opcode, and whether it is the form that only starts.
    fn of(opcode: &str) -> Option<(CollectiveKind, bool)> {
        let (name, starts) = opcode.strip_suffix("-start").map_or((opcode, false), |name| (name, true));
        CollectiveKind::ALL.iter().find(|(_, n)| *n == name).map(|(kind, _)| (*kind, starts))
    }

    /// The name that HLO uses.
    pub fn name(self) -> &'static str {
        CollectiveKind::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

impl fmt::Display for CollectiveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One collective of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collective {
    /// What it does.
    pub kind: CollectiveKind,
    /// The instruction.
    pub name: String,
    /// The name that the graph's author gave to what it computes.
    pub op_name: String,
    /// Bytes of its outputs on one device.
    pub bytes: u64,
    /// Devices of one group; of a permutation, its source-target pairs. 0 where the program does not say.
    pub group_size: u64,
    /// Executions in one run of the program, where every branch is taken and loops without known trips run once.
    pub times: u64,
}

/// The collectives of one kind in one run of the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CollectiveSum {
    /// Executions.
    pub count: u64,
    /// Bytes of all outputs on one device.
    pub bytes: u64,
}

impl Module {
    /// The collectives that run, computation by computation. One that is split into a start and its end is one, and so is
    /// one that takes its steps in several fusions, as libtpu has them do beside other work: they share its channel.
    pub fn collectives(&self) -> Vec<Collective> {
        let callers = self.wrappers();
        let (mut found, mut in_fusions) = (Vec::new(), HashSet::new());
        for (c, times) in self.reach(Follow::Fusions).into_iter().enumerate() {
            if times == 0 {
                continue;
            }
            let computation = &self.computations[c];
            for (place, instruction) in computation.instructions.iter().enumerate() {
                let Some((mut kind, starts)) = CollectiveKind::of(&instruction.opcode) else { continue };
                let mut bytes = output_bytes(kind, starts, instruction);
                let caller = callers.get(&c);
                let channel = instruction.channel;
                if channel != 0 && caller.is_some_and(|c| c.opcode == "fusion") && !in_fusions.insert((channel, kind)) {
                    continue;
                }
                if let (CollectiveKind::AllReduce, Some(piece)) = (kind, scattered(computation, place)) {
                    (kind, bytes) = (CollectiveKind::ReduceScatter, piece.shape.bytes());
                }
                let op_name = Some(&instruction.op_name).filter(|name| !name.is_empty());
                found.push(Collective {
                    kind,
                    name: instruction.name.clone(),
                    op_name: op_name.or(caller.map(|caller| &caller.op_name)).cloned().unwrap_or_default(),
                    bytes,
                    group_size: instruction.group_size.or(self.num_devices).unwrap_or(0),
                    times,
                });
            }
        }
        found
    }

    /// Count and bytes of each kind of collective.
    pub fn collective_sums(&self) -> BTreeMap<CollectiveKind, CollectiveSum> {
        let mut sums: BTreeMap<_, CollectiveSum> = BTreeMap::new();
        for collective in self.collectives() {
            let sum = sums.entry(collective.kind).or_default();
            sum.count = sum.count.saturating_add(collective.times);
            sum.bytes = sum.bytes.saturating_add(collective.bytes.saturating_mul(collective.times));
        }
        sums
    }
}

/// The result of a computation that keeps of an all-reduce nothing but pieces: the form that a reduce-scatter takes for
/// TPU, a fusion of an all-reduce and slices of its outputs.
fn scattered(computation: &Computation, place: usize) -> Option<&Instruction> {
    let at = |place: usize| &computation.instructions[place];
    let piece_of_it = |piece: usize| {
        let Some(&whole) = at(piece).operands.first().filter(|_| at(piece).opcode == "dynamic-slice") else {
            return false;
        };
        let moved = matches!(at(whole).opcode.as_str(), "bitcast" | "get-tuple-element");
        whole == place || (moved && at(whole).operands.first() == Some(&place))
    };
    let root = at(computation.root);
    let pieces = if root.opcode == "tuple" { &root.operands[..] } else { &[computation.root][..] };
    (!pieces.is_empty() && pieces.iter().all(|&piece| piece_of_it(piece))).then_some(root)
}

/// Bytes of what comes out in the end. A start has the operands beside the outputs in its tuple, except an all-reduce,
/// whose outputs have the operands' types.
fn output_bytes(kind: CollectiveKind, starts: bool, instruction: &Instruction) -> u64 {
    match (kind, starts, instruction.shape.parts()) {
        (CollectiveKind::AllReduce, ..) | (_, false, _) => instruction.shape.bytes(),
        (_, true, [_, outputs, ..]) => outputs.bytes(),
        (_, true, _) => instruction.shape.bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn only(instructions: &[Message]) -> Vec<Collective> {
        let last = 100 + instructions.len() as i64 - 1;
        parse(&module(1, &[computation(1, last, instructions)]).message(15, message().int(1, 1).int(2, 16)))
            .collectives()
    }

    #[test]
    fn the_four_ways_to_say_groups() {
        let reduce = |groups: fn(Message) -> Message| {
            only(&[groups(instruction(100, "all-reduce", array(F32, &[4]), &[]))])[0].group_size
        };
        assert_eq!(reduce(|i| i), 16);
        assert_eq!(reduce(|i| i.message(49, message())), 16);
        assert_eq!(reduce(|i| i.message(49, message().packed(1, &[0, 1, 2]))), 3);
        // CollectiveDeviceListProto: listed, and by counting (2 groups of 8).
        assert_eq!(reduce(|i| i.message(87, message().message(1, message().packed(1, &[0, 4])))), 2);
        assert_eq!(reduce(|i| i.message(87, message().message(2, message().int(1, 2).int(2, 8)))), 8);
        assert_eq!(reduce(|i| i.message(92, message().int(1, 4).int(2, 4))), 4);
        // A mesh of 2 by 8: its second axis, then half of that, then both.
        fn mesh() -> Message {
            let axis = |name: &str, size| message().bytes(1, name).int(2, size);
            message().message(1, message().message(1, axis("data", 2)).message(1, axis("model", 8)))
        }
        assert_eq!(reduce(|i| i.message(93, mesh().message(2, message().int(1, 1)))), 8);
        let half = |i: Message| {
            i.message(93, mesh().message(2, message().int(1, 1).message(2, message().int(1, 2).int(2, 4))))
        };
        assert_eq!(reduce(half), 4);
        assert_eq!(reduce(|i| i.message(93, mesh().message(2, message()).message(2, message().int(1, 1)))), 16);
        // An axis that the mesh does not have says nothing.
        assert_eq!(reduce(|i| i.message(93, mesh().message(2, message().int(1, 7)))), 16);
    }

    #[test]
    fn a_start_counts_once_with_its_output() {
        let (part, whole) = (array(F32, &[4]), array(F32, &[16]));
        let found = only(&[
            instruction(100, "all-gather-start", tuple(&[part.clone(), whole.clone()]), &[]),
            instruction(101, "all-gather-done", whole.clone(), &[100]),
            instruction(102, "all-reduce-start", whole.clone(), &[]),
            instruction(103, "all-reduce-done", whole, &[102]),
            instruction(104, "collective-permute-start", tuple(&[part.clone(), part.clone()]), &[])
                .message(52, message().int(2, 1))
                .message(52, message().int(1, 1)),
            instruction(105, "collective-permute-done", part, &[104]),
        ]);
        let shown: Vec<_> = found.iter().map(|c| (c.kind.name(), c.bytes, c.group_size)).collect();
        assert_eq!(shown, [("all-gather", 64, 16), ("all-reduce", 64, 16), ("collective-permute", 16, 2)]);
    }

    #[test]
    fn an_all_reduce_of_which_a_piece_stays_is_a_reduce_scatter() {
        let program = |keeps: Message, root| {
            let reduce = instruction(20, "all-reduce", array(F32, &[4, 16]), &[]);
            let inside = computation(2, root, &[reduce, keeps]);
            let fusion = instruction(10, "fusion", array(F32, &[4]), &[]);
            let fusion = fusion.packed(38, &[2]).message(7, message().bytes(2, "mlp/down"));
            parse(&module(1, &[inside, computation(1, 10, &[fusion])]))
        };
        let fused = program(instruction(21, "dynamic-slice", array(F32, &[4, 4]), &[20]), 21).collectives();
        let shown: Vec<_> = fused.iter().map(|c| (c.kind, c.bytes, c.op_name.as_str())).collect();
        assert_eq!(shown, [(CollectiveKind::ReduceScatter, 64, "mlp/down")]);
        // Two at once: pieces of the elements of a tuple.
        let whole = array(F32, &[4, 16]);
        let element = |id, index| instruction(id, "get-tuple-element", whole.clone(), &[20]).int(13, index);
        let pieces = [
            instruction(20, "all-reduce", tuple(&[whole.clone(), whole.clone()]), &[]),
            element(21, 0),
            element(22, 1),
            instruction(23, "dynamic-slice", array(F32, &[4, 4]), &[21]),
            instruction(24, "dynamic-slice", array(F32, &[4, 4]), &[22]),
            instruction(25, "tuple", tuple(&[array(F32, &[4, 4]), array(F32, &[4, 4])]), &[23, 24]),
        ];
        let fusion = instruction(10, "fusion", array(F32, &[4]), &[]).packed(38, &[2]);
        let two = parse(&module(1, &[computation(2, 25, &pieces), computation(1, 10, &[fusion])])).collectives();
        assert_eq!((two[0].kind, two[0].bytes), (CollectiveKind::ReduceScatter, 128));
        // A fusion that goes on computing with the whole has an all-reduce in it.
        let whole = program(instruction(21, "negate", array(F32, &[4, 16]), &[20]), 21).collectives();
        assert_eq!((whole[0].kind, whole[0].bytes), (CollectiveKind::AllReduce, 256));
    }

    #[test]
    fn steps_of_one_in_several_fusions_are_one() {
        let gather = |id, channel| instruction(id, "all-gather", array(F32, &[16]), &[]).int(26, channel);
        let step = |id, channel| computation(id, id * 10, &[gather(id * 10, channel)]);
        let fusion = |id, calls| instruction(id, "fusion", array(F32, &[16]), &[]).packed(38, &[calls]);
        let fusions = [fusion(100, 2), fusion(101, 3), fusion(102, 4), fusion(103, 5), gather(104, 7)];
        let computations = [step(2, 7), step(3, 7), step(4, 8), step(5, 0), computation(1, 104, &fusions)];
        let found = parse(&module(1, &computations)).collectives();
        let names: Vec<_> = found.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["all-gather.20", "all-gather.40", "all-gather.50", "all-gather.104"]);
    }

    #[test]
    fn sums_take_loops_and_what_runs_beside_into_account() {
        let start = instruction(950, "async-start", tuple(&[array(F32, &[4])]), &[]).packed(38, &[5]);
        let inside = computation(5, 50, &[instruction(50, "all-to-all", array(F32, &[4]), &[])]);
        let [body, condition] = counted_loop(10, 1, 7, &[start]);
        let mut entry = run_loop(970, 10).to_vec();
        entry.push(instruction(980, "all-to-all", array(F32, &[100]), &[]));
        let module = parse(&module(1, &[inside, body, condition, computation(1, 980, &entry)]));
        let wanted = CollectiveSum { count: 8, bytes: 7 * 16 + 400 };
        assert_eq!(module.collective_sums(), BTreeMap::from([(CollectiveKind::AllToAll, wanted)]));
    }
}
