//! Loops with a fixed number of turns, which have a derivative.

use std::panic::Location;
use std::rc::Rc;

use super::control::Call;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Kept, Save, Vjp, zeros};
use crate::graph::graph::Graph;
use crate::graph::module::{Body, Function};
use crate::graph::tensor::Tensor;

/// A loop over the first axis of some operands, which carries values from turn to turn and stacks others. Operands: what
/// every turn reads, what is carried, what is read turn by turn. Results: what is carried after the last turn, and the stacks.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Number of turns.
    pub length: usize,
    /// From the last turn to the first.
    pub reverse: bool,
    /// Number of operands that every turn reads whole.
    pub constants: usize,
    /// Number of operands that are carried.
    pub carried: usize,
    /// One turn: from what it reads, carries, and its pieces, to what it carries on and its pieces of the stacks.
    pub turn: Body,
    /// The loop in other ops.
    pub function: Rc<Function>,
    /// What its derivative keeps of each turn.
    pub save: Save,
}

op_info!(Scan, 0.., "scan", "a loop with a fixed number of turns");

impl Op for Scan {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Call { function: self.function.clone(), save: Save::Everything }.infer(inputs)
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("func.call @{}({}) : {}", self.function.name, cx.operands(), cx.signature())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        self.function.body.results.len()
    }

    fn regions(&self) -> Vec<&Body> {
        vec![&self.function.body]
    }

    /// A loop in the other direction: it carries the cotangents of what was carried and the sums of those of what every turn
    /// read, and reads the stacks of what the forward loop kept.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let location = Location::caller();
        let graph = cx.graph().clone();
        let (constants, carried) = (self.constants, self.carried);
        let is_float = |id| self.turn.aval(id).dtype.is_float();
        // A carried float may reach any other by the next turn.
        let (operands, floats) = (cx.operand_count(), |i: usize| is_float(self.turn.args[i]));
        let turns_back = |i: &usize| (constants..constants + carried).contains(i) && floats(*i);
        let wanted: Vec<usize> = (0..operands).filter(|i| turns_back(i) || cx.wants(*i)).collect();
        let carries: Vec<usize> = (0..carried).filter(|i| floats(constants + i)).collect();
        let stacks: Vec<usize> = cx.with_cotangents().into_iter().filter(|&i| i >= carried).collect();
        let given = [&carries[..], &stacks].concat();

        let halves = graph.halves(location, &self.function.name, &self.turn, &wanted, &given, &self.save);
        let own = self.turn.results.len();
        // What a turn keeps of what is carried differs from turn to turn, so it is stacked as other values are.
        let mut forward = halves.forward;
        let mut pieces = Vec::new();
        let mut whole = Vec::new();
        for kept in &halves.kept {
            let id = match *kept {
                Kept::Arg(i) if i < constants => {
                    whole.push(i);
                    continue;
                }
                Kept::Arg(i) => forward.args[i],
                Kept::Result(i) => forward.results[i],
            };
            pieces.push((*kept, id));
        }
        forward.results.truncate(own);
        let mut stacked = |id| {
            forward.results.push(id);
            forward.results.len() - 1
        };
        enum From {
            Operand(usize),
            Result(usize),
        }
        let read: Vec<From> = pieces
            .iter()
            .map(|&(kept, id)| match kept {
                Kept::Arg(i) if i >= constants + carried => From::Operand(i),
                Kept::Result(i) if i >= carried && i < own => From::Result(i),
                _ => From::Result(stacked(id)),
            })
            .collect();
        let extra: Vec<Aval> = forward.results[own..]
            .iter()
            .map(|&id| {
                let piece = forward.aval(id);
                Aval::new(piece.dtype, &[&[self.length][..], &piece.shape].concat())
            })
            .collect();
        let avals: Vec<(Option<String>, Aval)> = (0..operands).map(|i| (None, cx.input_aval(i))).collect();
        let shape = Shape { length: self.length, reverse: self.reverse, constants, carried };
        let scan = graph.scan_of(location, &self.function.name, shape, &avals, forward, self.save.clone());
        cx.amend(Rc::new(scan), &extra);

        // The derivative of a turn: (constants kept, cotangents carried and summed, cotangents of stacks and pieces kept).
        let sums: Vec<usize> = halves.reached.iter().copied().filter(|&i| i < constants).collect();
        let constants_kept: Vec<Tensor> = whole.iter().map(|&i| cx.input(i)).collect();
        let mut init: Vec<Tensor> = carries.iter().map(|&i| cx.cotangent(i)).collect();
        for &i in &sums {
            init.push(zeros(&graph, &cx.input_aval(i)));
        }
        let mut xs: Vec<Tensor> = stacks.iter().map(|&i| cx.cotangent(i)).collect();
        for from in &read {
            xs.push(match *from {
                From::Operand(i) => cx.input(i),
                From::Result(i) => cx.output(i),
            });
        }
        let mut order = Vec::new();
        let (mut next_whole, mut next_piece) = (0, 0);
        for kept in &halves.kept {
            let of_constant = matches!(*kept, Kept::Arg(i) if i < constants);
            let next = if of_constant { &mut next_whole } else { &mut next_piece };
            order.push((of_constant, *next));
            *next += 1;
        }
        let (backward, reached) = (&halves.backward, &halves.reached);
        let name = format!("{}_backward", self.function.name);
        let build = |whole: &[Tensor], carry: &[Tensor], pieces: &[Tensor]| {
            let (back, totals) = carry.split_at(carries.len());
            let (of_stacks, kept) = pieces.split_at(stacks.len());
            let kept =
                order.iter().map(|&(of_constant, i)| if of_constant { whole[i].clone() } else { kept[i].clone() });
            let args: Vec<Tensor> = back.iter().chain(of_stacks).cloned().chain(kept).collect();
            let found = graph.replay(backward, &args, &mut |_, _| None);
            let of = |i: usize| reached.iter().position(|&at| at == i).map(|at| found[at].clone());
            let back =
                carries.iter().zip(back).map(|(&i, ct)| of(constants + i).unwrap_or_else(|| zeros(&graph, ct.aval())));
            let totals = sums.iter().zip(totals).map(|(&i, total)| of(i).map_or(total.clone(), |ct| total + ct));
            let ys = reached.iter().filter(|&&i| i >= constants + carried).filter_map(|&i| of(i)).collect();
            (back.chain(totals).collect(), ys)
        };
        let (whole, init, xs) = (refs(&constants_kept), refs(&init), refs(&xs));
        let (finals, ys) = graph.scan_with(
            location,
            &name,
            (self.length, !self.reverse),
            (&whole, &init, &xs),
            &Save::Everything,
            build,
        );
        let stacked = reached.iter().copied().filter(|&i| i >= constants + carried);
        let operands: Vec<usize> = carries.iter().map(|i| constants + i).chain(sums).chain(stacked).collect();
        cx.placed(&operands, finals.into_iter().chain(ys))
    }
}

/// References to the elements.
fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

/// What is known of a scan beside its turn.
#[derive(Clone, Copy)]
struct Shape {
    length: usize,
    reverse: bool,
    constants: usize,
    carried: usize,
}

/// (whole, carried, turn by turn) operands of a scan.
type Operands<'a> = (&'a [&'a Tensor], &'a [&'a Tensor], &'a [&'a Tensor]);

impl Graph {
    /// A loop of `length` turns: `turn` gets (what every turn reads whole, what is carried, its pieces of `xs`: those of the
    /// first axis) and gives (what is carried on, its pieces of the stacks). The results are what is carried after the last turn
    /// and the stacks, whose first axis is the turns. `turn` is traced once and sees only its arguments.
    ///
    /// It has a derivative, which keeps of each turn what is read of it.
    ///
    /// Errors: an operand of `xs` whose first axis is not `length`, a carried value that changes its type or shape.
    #[track_caller]
    pub fn scan(
        &self,
        name: &str,
        length: usize,
        whole: &[&Tensor],
        init: &[&Tensor],
        xs: &[&Tensor],
        turn: impl FnOnce(&[Tensor], &[Tensor], &[Tensor]) -> (Vec<Tensor>, Vec<Tensor>),
    ) -> (Vec<Tensor>, Vec<Tensor>) {
        self.scan_with(Location::caller(), name, (length, false), (whole, init, xs), &Save::Everything, turn)
    }

    /// [`Graph::scan`] that keeps of each turn only what `save` says for its derivative, and computes the rest once more.
    #[track_caller]
    pub fn scan_saving(
        &self,
        name: &str,
        length: usize,
        operands: (&[&Tensor], &[&Tensor], &[&Tensor]),
        save: &Save,
        turn: impl FnOnce(&[Tensor], &[Tensor], &[Tensor]) -> (Vec<Tensor>, Vec<Tensor>),
    ) -> (Vec<Tensor>, Vec<Tensor>) {
        self.scan_with(Location::caller(), name, (length, false), operands, save, turn)
    }

    fn scan_with(
        &self,
        location: &'static Location<'static>,
        name: &str,
        (length, reverse): (usize, bool),
        (whole, init, xs): Operands<'_>,
        save: &Save,
        turn: impl FnOnce(&[Tensor], &[Tensor], &[Tensor]) -> (Vec<Tensor>, Vec<Tensor>),
    ) -> (Vec<Tensor>, Vec<Tensor>) {
        let (constants, carried) = (whole.len(), init.len());
        if let Some(x) = xs.iter().find(|x| x.shape().first() != Some(&length)) {
            self.fail(location, format!("scan: the first axis of {} must be the {length} turns", x.aval()));
            return (init.iter().map(|&x| x.clone()).collect(), Vec::new());
        }
        let named = |x: &&Tensor| (x.name(), x.aval().clone());
        let piece = |x: &&Tensor| (x.name(), Aval::new(x.dtype(), &x.shape()[1..]));
        let avals: Vec<(Option<String>, Aval)> =
            whole.iter().chain(init).map(named).chain(xs.iter().map(piece)).collect();
        let body = self.trace_avals(location, name, &avals, Some(name), |args| {
            let (whole, rest) = args.split_at(constants);
            let (carry, pieces) = rest.split_at(carried);
            let (carry, stacks) = turn(whole, carry, pieces);
            if carry.len() != carried {
                self.fail(location, format!("scan: a turn gets {carried} carried values and gives {}", carry.len()));
            }
            carry.into_iter().chain(stacks).collect()
        });
        for (i, x) in init.iter().enumerate() {
            let found = body.results.get(i).map(|&id| body.aval(id));
            if found != Some(x.aval()) {
                let found = found.map_or("nothing".to_string(), Aval::to_string);
                self.fail(location, format!("scan: carried value {i} begins as {}, a turn gives {found}", x.aval()));
                return (init.iter().map(|&x| x.clone()).collect(), Vec::new());
            }
        }
        let operands: Vec<&Tensor> = whole.iter().chain(init).chain(xs).copied().collect();
        let avals: Vec<_> = operands.iter().map(named).collect();
        let shape = Shape { length, reverse, constants, carried };
        let scan = self.scan_of(location, name, shape, &avals, body, save.clone());
        let mut results = self.record(location, Rc::new(scan), &operands);
        let stacks = results.split_off(carried.min(results.len()));
        (results, stacks)
    }

    /// The op for a traced turn, with the loop written out as a function.
    fn scan_of(
        &self,
        location: &'static Location<'static>,
        name: &str,
        shape: Shape,
        operands: &[(Option<String>, Aval)],
        turn: Body,
        save: Save,
    ) -> Scan {
        let Shape { length, reverse, constants, carried } = shape;
        let body = self.trace_avals(location, name, operands, Some(name), |args| {
            let stacks: Vec<Tensor> = turn.results[carried.min(turn.results.len())..]
                .iter()
                .map(|&id| {
                    let piece = turn.aval(id);
                    zeros(self, &Aval::new(piece.dtype, &[&[length][..], &piece.shape].concat()))
                })
                .collect();
            if length == 0 {
                return args[constants..constants + carried].iter().cloned().chain(stacks).collect();
            }
            let zero = self.scalar(0i64, DType::I32);
            let init: Vec<&Tensor> = std::iter::once(&zero).chain(args).chain(&stacks).collect();
            let results = self.while_loop(
                &init,
                |values| values[0].lt(length as i64),
                |values| {
                    let (count, values) = (&values[0], &values[1..]);
                    let (operands, stacks) = values.split_at(args.len());
                    let at = if reverse { (length as i64 - 1) - count } else { count.clone() };
                    let zero = self.scalar(0i64, DType::I32);
                    let corner = |rank: usize| {
                        std::iter::once(&at)
                            .chain(std::iter::repeat_n(&zero, rank.saturating_sub(1)))
                            .collect::<Vec<_>>()
                    };
                    let piece = |x: &Tensor| {
                        // After an error shapes may be anything.
                        let shape = x.shape().get(1..).unwrap_or_default();
                        x.dynamic_slice(&corner(x.rank()), &[&[1], shape].concat()).reshape(shape)
                    };
                    let (fixed, xs) = operands.split_at(constants + carried);
                    let turn_args: Vec<Tensor> = fixed.iter().cloned().chain(xs.iter().map(piece)).collect();
                    let mut carry = self.replay(&turn, &turn_args, &mut |_, _| None);
                    let pieces = carry.split_off(carried.min(carry.len()));
                    let stacked = stacks.iter().zip(&pieces).map(|(stack, piece)| {
                        let one = [&[1], piece.shape()].concat();
                        stack.dynamic_update_slice(&piece.reshape(&one), &corner(stack.rank()))
                    });
                    let fixed = operands[..constants].iter().cloned();
                    let next = std::iter::once(count + 1).chain(fixed).chain(carry).chain(xs.iter().cloned());
                    next.chain(stacked).collect()
                },
            );
            let (carry, stacks) = (&results[1 + constants..][..carried], &results[1 + args.len()..]);
            carry.iter().chain(stacks).cloned().collect()
        });
        let function = self.add_function(name, body);
        Scan { length, reverse, constants, carried, turn, function, save }
    }
}
