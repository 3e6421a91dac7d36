//! From the bytes of a serialized `HloModuleProto` to a [`Module`].

use super::error::HloError;
use super::groups::Groups;
use super::literal;
use super::module::{Alias, Computation, Instruction, Module};
use super::shape::Shape;
use super::trips;
use super::wire::Cursor;
use std::collections::HashMap;

/// An instruction whose references are still ids.
struct RawInstruction {
    id: i64,
    operands: Vec<i64>,
    calls: Vec<i64>,
    instruction: Instruction,
}

/// A computation whose references are still ids.
struct RawComputation {
    id: i64,
    root: i64,
    name: String,
    instructions: Vec<RawInstruction>,
}

/// Reads `HloModuleProto`.
///
/// # Errors
/// Damaged bytes.
pub(super) fn read_module(bytes: &[u8]) -> Result<Module, HloError> {
    let mut cursor = Cursor::new("HloModuleProto", bytes);
    let (mut name, mut entry, mut raw, mut aliases, mut num_devices) = (String::new(), 0, Vec::new(), Vec::new(), None);
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => name = cursor.text(field, value)?,
            3 => raw.push(read_computation(cursor.bytes(field, value)?)?),
            6 => entry = cursor.int(field, value)?,
            8 => aliases = read_aliases(cursor.bytes(field, value)?)?,
            15 => num_devices = read_assignment(cursor.bytes(field, value)?)?,
            _ => {}
        }
    }
    let mut places = HashMap::new();
    let mut computations = Vec::with_capacity(raw.len());
    for computation in raw {
        let id = computation.id;
        // Looked up before its own place is known: a computation may call only such as stand before it.
        let resolved = resolve(computation, &places)?;
        places.insert(id, computations.len());
        computations.push(resolved);
    }
    let entry = *places.get(&entry).ok_or_else(|| HloError::Reference {
        what: "the entry computation",
        id: entry,
        holder: format!("module {name}"),
        trouble: "does not exist",
    })?;
    let mut module = Module { name, computations, entry, aliases, num_devices, trips: HashMap::new() };
    module.trips = trips::find(&module);
    Ok(module)
}

fn resolve(raw: RawComputation, computations: &HashMap<i64, usize>) -> Result<Computation, HloError> {
    let places: HashMap<i64, usize> = raw.instructions.iter().enumerate().map(|(place, i)| (i.id, place)).collect();
    let missing = |what, id, holder, trouble| HloError::Reference { what, id, holder, trouble };
    let root = places.get(&raw.root).copied();
    let root = root.ok_or_else(|| {
        missing("the root instruction", raw.root, format!("computation {}", raw.name), "does not exist")
    })?;
    let resolve_one = |raw: RawInstruction| {
        let RawInstruction { operands, calls, mut instruction, .. } = raw;
        let holder = || format!("instruction {}", instruction.name);
        let operand =
            |id: &i64| places.get(id).copied().ok_or_else(|| missing("operand", *id, holder(), "does not exist"));
        let trouble = "does not exist or stands after its caller";
        let call = |id: &i64| {
            computations.get(id).copied().ok_or_else(|| missing("called computation", *id, holder(), trouble))
        };
        let operands = operands.iter().map(operand).collect::<Result<_, _>>()?;
        let calls = calls.iter().map(call).collect::<Result<_, _>>()?;
        (instruction.operands, instruction.calls) = (operands, calls);
        Ok(instruction)
    };
    let instructions = raw.instructions.into_iter().map(resolve_one).collect::<Result<_, _>>()?;
    Ok(Computation { name: raw.name, instructions, root })
}

/// Reads `HloComputationProto`.
fn read_computation(bytes: &[u8]) -> Result<RawComputation, HloError> {
    let mut cursor = Cursor::new("HloComputationProto", bytes);
    let mut raw = RawComputation { id: 0, root: 0, name: String::new(), instructions: Vec::new() };
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => raw.name = cursor.text(field, value)?,
            2 => raw.instructions.push(read_instruction(cursor.bytes(field, value)?)?),
            5 => raw.id = cursor.int(field, value)?,
            6 => raw.root = cursor.int(field, value)?,
            _ => {}
        }
    }
    Ok(raw)
}

/// Reads `HloInstructionProto`.
fn read_instruction(bytes: &[u8]) -> Result<RawInstruction, HloError> {
    let mut cursor = Cursor::new("HloInstructionProto", bytes);
    let mut raw =
        RawInstruction { id: 0, operands: Vec::new(), calls: Vec::new(), instruction: Instruction::default() };
    let (mut groups, mut literal) = (Groups::default(), None);
    let i = &mut raw.instruction;
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => i.name = cursor.text(field, value)?,
            2 => i.opcode = cursor.text(field, value)?,
            3 => i.shape = Shape::read(cursor.bytes(field, value)?, 0)?,
            7 => i.op_name = read_op_name(cursor.bytes(field, value)?)?,
            8 => literal = Some(cursor.bytes(field, value)?),
            9 => i.parameter = cursor.int(field, value)? as u64,
            13 => i.tuple_index = cursor.int(field, value)? as u64,
            26 => i.channel = cursor.int(field, value)?,
            28 => i.custom_call_target = cursor.text(field, value)?,
            35 => raw.id = cursor.int(field, value)?,
            36 => cursor.ints(field, value, &mut raw.operands)?,
            38 => cursor.ints(field, value, &mut raw.calls)?,
            43 => i.backend_config = cursor.bytes(field, value)?.to_vec(),
            63 => i.comparison = cursor.text(field, value)?,
            _ => groups.field(&cursor, field, value)?,
        }
    }
    i.group_size = groups.size();
    // Large constants are not looked into.
    if let (Some(literal), Some(1)) = (literal, i.shape.array().map(|array| array.elements())) {
        i.scalar = literal::scalar(literal)?;
    }
    Ok(raw)
}

/// Reads `OpMetadata`.
fn read_op_name(bytes: &[u8]) -> Result<String, HloError> {
    let (mut cursor, mut name) = (Cursor::new("OpMetadata", bytes), String::new());
    while let Some((field, value)) = cursor.next()? {
        if field == 2 {
            name = cursor.text(field, value)?;
        }
    }
    Ok(name)
}

/// Reads `HloInputOutputAliasProto`.
fn read_aliases(bytes: &[u8]) -> Result<Vec<Alias>, HloError> {
    let (mut cursor, mut aliases) = (Cursor::new("HloInputOutputAliasProto", bytes), Vec::new());
    while let Some((field, value)) = cursor.next()? {
        if field == 1 {
            aliases.push(read_alias(cursor.bytes(field, value)?)?);
        }
    }
    Ok(aliases)
}

/// Reads `AliasEntryProto`.
fn read_alias(bytes: &[u8]) -> Result<Alias, HloError> {
    let mut cursor = Cursor::new("AliasEntryProto", bytes);
    let (mut output, mut parameter, mut path, mut kind) = (Vec::new(), 0, Vec::new(), 0);
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => cursor.ints(field, value, &mut output)?,
            2 => parameter = cursor.int(field, value)? as u64,
            3 => cursor.ints(field, value, &mut path)?,
            4 => kind = cursor.int(field, value)?,
            _ => {}
        }
    }
    let unsigned = |path: Vec<i64>| path.into_iter().map(|i| i as u64).collect();
    Ok(Alias { output: unsigned(output), parameter, parameter_path: unsigned(path), must: kind == 2 })
}

/// Reads `DeviceAssignmentProto`: replicas times partitions.
fn read_assignment(bytes: &[u8]) -> Result<Option<u64>, HloError> {
    let (mut cursor, mut replicas, mut partitions) = (Cursor::new("DeviceAssignmentProto", bytes), 0, 0);
    while let Some((field, value)) = cursor.next()? {
        match field {
            1 => replicas = cursor.int(field, value)?,
            2 => partitions = cursor.int(field, value)?,
            _ => {}
        }
    }
    Ok(replicas.checked_mul(partitions).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0))
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{ArrayShape, CollectiveKind, Scalar};
    use super::*;

    /// Twenty-one trips of a loop in a loop, a conditional, a fusion, a collective, and everything else that is read.
    fn everything() -> Vec<u8> {
        let reduce = instruction(950, "all-reduce", array(BF16, &[8, 16]), &[])
            .bytes(43, "{\"estimated_cycles\":\"12\"}")
            .message(7, message().bytes(1, "type").bytes(2, "layers.0/out"))
            .message(49, message().packed(1, &[0, 1]))
            .message(49, message().packed(1, &[2, 3]));
        let inner = counted_loop(10, 1, 7, &[estimated(951, "fusion", 100), reduce]);
        let outer = counted_loop(20, 2, 5, &run_loop(960, 10));
        let fused = computation(30, 3000, &[instruction(3000, "copy", array(F32, &[1 << 20]), &[])]);
        let mut entry = run_loop(970, 20).to_vec();
        entry.push(instruction(980, "fusion", array(F32, &[1 << 20]), &[971]).packed(38, &[30]));
        entry.push(instruction(981, "copy-start", tuple(&[array_in(F32, &[8], 1), array(F32, &[8])]), &[971]));
        entry.push(instruction(982, "tuple", tuple(&[array(F32, &[8])]), &[971]));
        let [a, b] = inner;
        let [c, d] = outer;
        let alias = message().packed(1, &[1]).int(2, 3).packed(3, &[0, 2]).int(4, 2);
        let module = module(40, &[a, b, c, d, fused, computation(40, 982, &entry)])
            .message(8, message().message(1, alias))
            .message(15, message().int(1, 2).int(2, 4));
        message().message(1, module).bytes(2, "config").0
    }

    /// Runs every analysis, so that hostile programs meet all the code.
    fn analyse(module: &Module) {
        let _ = (module.cycles(), module.costs(), module.unestimated(), module.collective_sums());
        let _ = (module.copies(0), module.opcode_counts(), module.parameter_bytes());
        let shapes = module.computations.iter().flat_map(|c| &c.instructions).map(|i| i.shape.to_string());
        assert!(shapes.map(|s| s.len()).sum::<usize>() < 1 << 20);
    }

    #[test]
    fn a_module_is_read_with_everything_in_it() {
        let module = Module::parse("hlo_with_config", &everything()).unwrap();
        assert_eq!((module.name.as_str(), module.num_devices, module.entry), ("made by hand", Some(8), 5));
        let alias = Alias { output: vec![1], parameter: 3, parameter_path: vec![0, 2], must: true };
        assert_eq!(module.aliases, [alias]);
        assert_eq!(module.entry().instructions[module.entry().root].shape.to_string(), "(f32[8])");
        assert_eq!(module.parameter_bytes(), 8 * 4);
        let reduce = module.computations[0].instructions.iter().find(|i| i.opcode == "all-reduce").unwrap();
        assert_eq!((reduce.name.as_str(), reduce.op_name.as_str()), ("all-reduce.950", "layers.0/out"));
        assert_eq!(reduce.group_size, Some(2));
        let shape = reduce.shape.array().unwrap();
        assert_eq!((shape.bytes(), shape.elements(), shape.element.dtype()), (256, 128, Some(crate::DType::BF16)));
        assert_eq!(shape.minor_to_major, [1, 0]);
        // Three trips of the outer loop (0, 2, 4) times seven of the inner one.
        assert_eq!(module.cycles().unwrap().total, 21 * (100 + 12));
        let [collective] = &module.collectives()[..] else { panic!("{:?}", module.collectives()) };
        assert_eq!((collective.kind, collective.times), (CollectiveKind::AllReduce, 21));
        let copies = module.copies(16);
        let seen: Vec<_> = copies.iter().map(|c| (c.name.as_str(), c.bytes, c.between_memories)).collect();
        assert_eq!(seen, [("fusion.980", 4 << 20, false), ("copy-start.981", 32, true)]);
        assert_eq!(module.opcode_counts()["while"], 2);
        assert_eq!(module.opcode_counts()["constant"], 6);
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let error = Module::parse("mlir", b"module {}").unwrap_err().to_string();
        assert!(error.contains("\"mlir\"") && error.contains("hlo_with_config"), "{error}");
    }

    #[test]
    fn truncated_programs_do_not_panic() {
        let whole = everything();
        let mut refused = 0;
        for length in 0..whole.len() {
            match Module::parse("hlo_with_config", &whole[..length]) {
                Ok(module) => analyse(&module),
                Err(_) => refused += 1,
            }
        }
        // All but the ends within the last, unread field.
        assert!(refused >= whole.len() - 9, "{refused} of {}", whole.len());
    }

    #[test]
    fn flipped_bits_do_not_panic() {
        let whole = everything();
        let mut state = 1u64;
        let mut random = move |below: usize| {
            // Knuth's MMIX generator; the upper bits are the good ones.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        let mut read = 0;
        for round in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + round % 4 {
                let at = random(bytes.len());
                bytes[at] ^= 1 << random(8);
            }
            if let Ok(module) = Module::parse("hlo_with_config", &bytes) {
                analyse(&module);
                read += 1;
            }
        }
        assert!((1..20_000).contains(&read), "{read} of 20000 were still programs");
    }

    #[test]
    fn shapes_nested_without_end_are_refused() {
        let deep = |depth| (0..depth).fold(array(F32, &[2]), |shape, _| tuple(&[shape]));
        let program = |depth| module(1, &[computation(1, 2, &[instruction(2, "parameter", deep(depth), &[])])]);
        assert_eq!(parse(&program(64)).parameter_bytes(), 8);
        let error = Module::parse("hlo", &program(65).0).unwrap_err().to_string();
        assert!(error.contains("nested more than 64 deep"), "{error}");
        assert!(Module::parse("hlo", &program(20_000).0).is_err());
    }

    #[test]
    fn references_that_lead_nowhere_are_refused() {
        let refused = |module: Message| Module::parse("hlo", &module.0).unwrap_err().to_string();
        let one = |calls: &[i64], operands: &[i64]| {
            computation(1, 2, &[instruction(2, "call", array(F32, &[]), operands).packed(38, calls)])
        };
        let error = refused(module(7, &[one(&[], &[])]));
        assert_eq!(error, "damaged HLO program: the entry computation 7 of module made by hand does not exist");
        let error = refused(module(1, &[one(&[], &[55])]));
        assert_eq!(error, "damaged HLO program: operand 55 of instruction call.2 does not exist");
        // A computation that calls itself would never end.
        let error = refused(module(1, &[one(&[1], &[])]));
        assert!(error.contains("called computation 1 of instruction call.2 does not exist or stands after"), "{error}");
        let error = refused(module(1, &[computation(1, 9, &[])]));
        assert!(error.contains("the root instruction 9 of computation computation.1"), "{error}");
    }

    #[test]
    fn calls_that_double_at_each_step_are_counted_in_no_time() {
        let call = |id: i64| instruction(id * 10, "call", array(F32, &[]), &[]).packed(38, &[id - 1, id - 1]);
        let mut computations = vec![computation(1, 10, &[estimated(10, "fusion", 3)])];
        computations.extend((2..200).map(|id| computation(id, id * 10, &[call(id)])));
        let module = parse(&module(199, &computations));
        assert_eq!(module.cycles().unwrap().total, u64::MAX);
        assert_eq!(module.costs()[0].times, u64::MAX);
    }

    #[test]
    fn sizes_beyond_all_memory_do_not_overflow() {
        let huge = ArrayShape { dims: vec![u64::MAX, 3], ..huge_element() };
        assert_eq!(huge.bytes(), u64::MAX / 8 + 1);
        assert_eq!(ArrayShape { dims: vec![u64::MAX, 0], ..huge_element() }.bytes(), 0);
    }

    fn huge_element() -> ArrayShape {
        let module = parse(&module(1, &[computation(1, 2, &[instruction(2, "parameter", array(F32, &[]), &[])])]));
        module.entry().instructions[0].shape.array().unwrap().clone()
    }

    #[test]
    fn scalars_of_each_type_are_read() {
        let scalar = |element: i64, literal: Message| {
            let constant = instruction(2, "constant", array(element, &[]), &[]).message(8, literal);
            parse(&module(1, &[computation(1, 2, &[constant])])).entry().instructions[0].scalar
        };
        assert_eq!(scalar(1, message().packed(2, &[1])), Some(Scalar::Bool(true)));
        assert_eq!(scalar(S32, message().packed(4, &[-5])), Some(Scalar::Int(-5)));
        assert_eq!(scalar(5, message().packed(5, &[1 << 40])), Some(Scalar::Int(1 << 40)));
        assert_eq!(scalar(9, message().packed(7, &[-1])), None);
        assert_eq!(scalar(2, message().bytes(15, [0xff])), Some(Scalar::Int(-1)));
        assert_eq!(scalar(6, message().bytes(3, [0xff])), Some(Scalar::Int(255)));
        assert_eq!(scalar(F32, message().bytes(8, 1.5f32.to_le_bytes())), Some(Scalar::Float(1.5)));
        assert_eq!(scalar(BF16, message().bytes(13, [0xc0, 0x3f])), Some(Scalar::Float(1.5)));
        // A list is not a scalar, whatever it holds.
        let list = instruction(2, "constant", array(S32, &[2]), &[]).message(8, message().packed(4, &[1, 2]));
        assert_eq!(parse(&module(1, &[computation(1, 2, &[list])])).entry().instructions[0].scalar, None);
    }
}
