//! The program as data: computations of instructions.

use super::error::HloError;
use super::literal::Scalar;
use super::read::read_module;
use super::shape::Shape;
use super::wire::Cursor;
use std::collections::{BTreeMap, HashMap};

/// An optimized program, as one device runs it.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Its computations; each calls only such as stand before it.
    pub computations: Vec<Computation>,
    /// The place of the computation that runs first.
    pub entry: usize,
    /// Outputs that take over the memory of parameters.
    pub aliases: Vec<Alias>,
    /// Devices that it was compiled for, where it says so.
    pub num_devices: Option<u64>,
    /// How often the body of each loop runs, by the places of computation and instruction; see
    /// [`trip_count`](Module::trip_count).
    pub(super) trips: HashMap<(usize, usize), u64>,
}

/// A list of instructions with parameters and one result.
#[derive(Clone, Debug, PartialEq)]
pub struct Computation {
    /// Its name.
    pub name: String,
    /// Its instructions; operands are places in this list.
    pub instructions: Vec<Instruction>,
    /// The place of the instruction whose value is the result.
    pub root: usize,
}

/// One instruction.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instruction {
    /// Its name, unique in the module.
    pub name: String,
    /// Its operation, as HLO text writes it: `dot`, `fusion`, `all-reduce-start`, ….
    pub opcode: String,
    /// The type of its value.
    pub shape: Shape,
    /// Its operands, places in the computation's list.
    pub operands: Vec<usize>,
    /// Computations it calls, places in the module's list. Of a loop: body, then condition.
    pub calls: Vec<usize>,
    /// The name that the graph's author gave (`loc` of StableHLO): `layers.0/attention/scores`. May be empty.
    pub op_name: String,
    /// What the compiler noted for itself: JSON text on all platforms seen so far.
    pub backend_config: Vec<u8>,
    /// Of a parameter, its number.
    pub parameter: u64,
    /// Of `get-tuple-element`, the element's number.
    pub tuple_index: u64,
    /// Of `compare`, the direction: `LT`, `EQ`, ….
    pub comparison: String,
    /// Of `custom-call`, its target.
    pub custom_call_target: String,
    /// Of a constant of one element, its value, where its type is read here.
    pub scalar: Option<Scalar>,
    /// Of a collective, the devices of one group; of `collective-permute`, its source-target pairs. `None` where all
    /// devices are one group, and for everything else.
    pub group_size: Option<u64>,
    /// Of a collective, its channel: devices meet where they name the same one. 0 where there is none.
    pub channel: i64,
}

/// An output that takes over the memory of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The output: its path of tuple elements (one number for a program with a list of outputs, none for one output).
    pub output: Vec<u64>,
    /// The parameter.
    pub parameter: u64,
    /// The path in the parameter where that is a tuple.
    pub parameter_path: Vec<u64>,
    /// True where the compiler must do it, false where it may.
    pub must: bool,
}

impl Module {
    /// Reads a program that [`Executable::optimized_program`](crate::pjrt::Executable::optimized_program) gave.
    ///
    /// # Errors
    /// A format other than `hlo` and `hlo_with_config`, or damaged bytes. Never panics, whatever the bytes are.
    pub fn parse(format: &str, bytes: &[u8]) -> Result<Module, HloError> {
        match format {
            "hlo" => read_module(bytes),
            "hlo_with_config" => {
                let (mut cursor, mut module) = (Cursor::new("HloModuleProtoWithConfig", bytes), [].as_slice());
                while let Some((field, value)) = cursor.next()? {
                    if field == 1 {
                        module = cursor.bytes(field, value)?;
                    }
                }
                read_module(module)
            }
            other => Err(HloError::Format { format: other.to_owned() }),
        }
    }

    /// The computation that runs first.
    pub fn entry(&self) -> &Computation {
        &self.computations[self.entry]
    }

    /// Bytes of all parameters on one device: weights, caches and inputs. What a step reads at least, where it uses
    /// all of them.
    pub fn parameter_bytes(&self) -> u64 {
        let parameters = self.entry().instructions.iter().filter(|i| i.opcode == "parameter");
        parameters.fold(0, |n, parameter| n.saturating_add(parameter.shape.bytes()))
    }

    /// How many instructions there are of each opcode, those inside fusions too, each counted once.
    pub fn opcode_counts(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for instruction in self.computations.iter().flat_map(|c| &c.instructions) {
            *counts.entry(instruction.opcode.as_str()).or_default() += 1;
        }
        counts
    }
}
