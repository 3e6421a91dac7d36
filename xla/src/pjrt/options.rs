//! Compile options, encoded by hand as `CompileOptionsProto` of `xla/pjrt/proto/compile_options.proto`.

use super::error::Error;
use std::collections::BTreeMap;

/// A compiler option for one program, by the name of its XLA flag without dashes.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionOverride {
    /// Text, also for enumerations.
    Str(String),
    /// A flag.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A number.
    Float(f64),
}

/// How to compile a program. The default is one device.
#[derive(Clone, Debug, PartialEq)]
pub struct CompileOptions {
    /// Copies of the program that run side by side on different data.
    pub num_replicas: usize,
    /// Devices that share one copy of the program.
    pub num_partitions: usize,
    /// Split one program over the partitions by its sharding annotations.
    pub use_spmd_partitioning: bool,
    /// Read the annotations as Shardy's (`sdy`) and not as GSPMD strings.
    pub use_shardy_partitioner: bool,
    /// Device ids by replica and partition, `num_replicas` rows of `num_partitions`; `None` leaves it to the plugin.
    pub device_assignment: Option<Vec<Vec<i64>>>,
    /// Compile for any device of the kind: the device is chosen by the arguments of each execution.
    pub compile_portable_executable: bool,
    /// Let the partitioner choose the sharding of arguments without one (one element: for all).
    pub allow_sharding_propagation_to_parameters: Vec<bool>,
    /// Let the partitioner choose the sharding of outputs without one (one element: for all).
    pub allow_sharding_propagation_to_output: Vec<bool>,
    /// Effort spent on execution time, -1 to 1; 0 is the compiler's usual.
    pub exec_time_optimization_effort: f32,
    /// Effort spent on fitting the memory, -1 to 1; 0 is the compiler's usual.
    pub memory_fitting_effort: f32,
    /// Memory of the device in bytes that the compiler plans with; 0 for what the device has.
    pub device_memory_size: i64,
    /// A profile for feedback-directed optimisation; empty for none.
    pub fdo_profile: Vec<u8>,
    /// Options of the compiler for this program; unknown names are an error of the plugin.
    pub env_options: BTreeMap<String, OptionOverride>,
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions {
            num_replicas: 1,
            num_partitions: 1,
            use_spmd_partitioning: false,
            use_shardy_partitioner: false,
            device_assignment: None,
            compile_portable_executable: false,
            allow_sharding_propagation_to_parameters: Vec::new(),
            allow_sharding_propagation_to_output: Vec::new(),
            exec_time_optimization_effort: 0.0,
            memory_fitting_effort: 0.0,
            device_memory_size: 0,
            fdo_profile: Vec::new(),
            env_options: BTreeMap::new(),
        }
    }
}

impl CompileOptions {
    /// One program split over `num_partitions` devices by Shardy annotations.
    pub fn sharded(num_partitions: usize) -> Self {
        CompileOptions {
            num_partitions,
            use_spmd_partitioning: true,
            use_shardy_partitioner: true,
            ..CompileOptions::default()
        }
    }

    /// One device, by its id.
    pub fn on_device(id: i32) -> Self {
        CompileOptions { device_assignment: Some(vec![vec![i64::from(id)]]), ..CompileOptions::default() }
    }

    /// What a compiler would abort on rather than refuse.
    fn check(&self) -> Result<(), Error> {
        let (replicas, partitions) = (self.num_replicas, self.num_partitions);
        if replicas == 0 || partitions == 0 {
            return Err(Error::invalid(format!(
                "a program needs at least 1 replica and 1 partition, the compile options have {replicas} and {partitions}"
            )));
        }
        let Some(rows) = &self.device_assignment else { return Ok(()) };
        if rows.len() != replicas || rows.iter().any(|row| row.len() != partitions) {
            return Err(Error::invalid(format!(
                "a device assignment needs {replicas} rows (replicas) of {partitions} ids (partitions), found {rows:?}"
            )));
        }
        Ok(())
    }

    /// The serialized `CompileOptionsProto`.
    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let mut build = Proto::default();
        build.int(1, -1); // device_ordinal: unset
        build.int(4, self.num_replicas as i64);
        build.int(5, self.num_partitions as i64);
        build.flag(6, self.use_spmd_partitioning);
        if let Some(rows) = &self.device_assignment {
            build.message(9, &device_assignment(rows));
        }
        build.bools(12, &self.allow_sharding_propagation_to_output);
        if !self.fdo_profile.is_empty() {
            build.bytes(14, &self.fdo_profile);
        }
        if self.device_memory_size != 0 {
            build.int(15, self.device_memory_size);
        }
        build.bools(18, &self.allow_sharding_propagation_to_parameters);
        build.flag(19, self.use_shardy_partitioner);
        build.float(20, self.exec_time_optimization_effort);
        build.float(21, self.memory_fitting_effort);

        let mut options = Proto::default();
        options.message(3, &build);
        options.flag(4, self.compile_portable_executable);
        for (name, value) in &self.env_options {
            let mut entry = Proto::default();
            entry.bytes(1, name.as_bytes());
            let mut field = Proto::default();
            match value {
                OptionOverride::Str(v) => field.bytes(1, v.as_bytes()),
                OptionOverride::Bool(v) => field.int(2, i64::from(*v)),
                OptionOverride::Int(v) => field.int(3, *v),
                OptionOverride::Float(v) => field.double(4, *v),
            }
            entry.message(2, &field);
            options.message(7, &entry);
        }
        Ok(options.0)
    }
}

/// `DeviceAssignmentProto`: one `ComputationDevice` per partition, which lists its device of each replica.
fn device_assignment(rows: &[Vec<i64>]) -> Proto {
    let partitions = rows.first().map_or(0, Vec::len);
    let mut proto = Proto::default();
    proto.int(1, rows.len() as i64);
    proto.int(2, partitions as i64);
    for partition in 0..partitions {
        let ids = rows.iter().filter_map(|row| row.get(partition));
        let mut packed = Proto::default();
        ids.for_each(|id| packed.varint(*id as u64));
        let mut device = Proto::default();
        device.bytes(1, &packed.0);
        proto.message(3, &device);
    }
    proto
}

/// A protocol-buffer message being written.
#[derive(Default)]
struct Proto(Vec<u8>);

impl Proto {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire: u64) {
        self.varint(field << 3 | wire);
    }

    fn int(&mut self, field: u64, value: i64) {
        self.key(field, 0);
        self.varint(value as u64);
    }

    fn flag(&mut self, field: u64, value: bool) {
        if value {
            self.int(field, 1);
        }
    }

    fn float(&mut self, field: u64, value: f32) {
        if value != 0.0 {
            self.key(field, 5);
            self.0.extend(value.to_le_bytes());
        }
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, field: u64, value: &Proto) {
        self.bytes(field, &value.0);
    }

    fn bools(&mut self, field: u64, values: &[bool]) {
        if !values.is_empty() {
            let packed: Vec<u8> = values.iter().map(|v| u8::from(*v)).collect();
            self.bytes(field, &packed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_options_by_hand() {
        let minus_one = [0xff; 9].iter().chain(&[0x01]).copied();
        let build: Vec<u8> = [0x08].into_iter().chain(minus_one).chain([0x20, 1, 0x28, 1]).collect();
        let mut expected = vec![0x1a, build.len() as u8];
        expected.extend(build);
        assert_eq!(CompileOptions::default().encode().unwrap(), expected);
    }

    #[test]
    fn device_assignment_is_listed_by_partition() {
        // Two replicas of three partitions.
        let proto = device_assignment(&[vec![0, 1, 2], vec![3, 4, 300]]);
        let expected = [
            0x08, 2, 0x10, 3, // counts
            0x1a, 4, 0x0a, 2, 0, 3, // partition 0
            0x1a, 4, 0x0a, 2, 1, 4, // partition 1
            0x1a, 5, 0x0a, 3, 2, 0xac, 0x02, // partition 2
        ];
        assert_eq!(proto.0, expected);
    }

    #[test]
    fn overrides_become_map_entries() {
        let mut options = CompileOptions::default();
        options.env_options.insert("a".into(), OptionOverride::Bool(true));
        options.env_options.insert("b".into(), OptionOverride::Str("x".into()));
        let bytes = options.encode().unwrap();
        let tail = [0x3a, 7, 0x0a, 1, b'a', 0x12, 2, 0x10, 1, 0x3a, 8, 0x0a, 1, b'b', 0x12, 3, 0x0a, 1, b'x'];
        assert!(bytes.ends_with(&tail), "{bytes:x?}");
    }

    #[test]
    fn assignments_that_do_not_fit_are_refused() {
        let options = CompileOptions { device_assignment: Some(vec![vec![0, 1]]), ..CompileOptions::sharded(4) };
        let error = options.encode().unwrap_err().to_string();
        assert_eq!(error, "a device assignment needs 1 rows (replicas) of 4 ids (partitions), found [[0, 1]]");
        assert!(CompileOptions::sharded(0).encode().is_err());
    }
}
