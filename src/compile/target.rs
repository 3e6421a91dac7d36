//! What to compile for: a slice of TPUs, GPUs, or the CPU, none of which need be there.
//!
//! | text | means |
//! |---|---|
//! | `v5e:2x4`, `v5p:2x2x4` | a slice of TPU chips, by its shape |
//! | `h200`, `h200x8`, `h200:2x1x8` | GPUs: one, eight of one host, two groups of one host of eight |
//! | `my.textproto`, `my.textproto:1x1x4` | GPUs as the file describes them (a `GpuTargetConfigProto`) |
//! | `cpu`, `cpux4` | the processor of this machine, as one device or four |

use std::fs;
use std::path::{Path, PathBuf};

use xla::pjrt::{
    Client, CompileOptions, DeviceDescription, Executable, LoadedExecutable, OptionOverride, Plugin, Topology, Value,
};
use xla::wheel::PluginKind;

use super::chips::{self, CHIPS, Chip};
use crate::Error;
use crate::runtime::register_kernels;

/// More devices than any slice has.
const MAX_DEVICES: usize = 16_384;

/// The GPUs whose description ships with the program.
const GPUS: [(&str, &str); 3] = [
    ("h100", include_str!("targets/h100.textproto")),
    ("h200", include_str!("targets/h200.textproto")),
    ("b200", include_str!("targets/b200.textproto")),
];

/// What to compile for, as the user wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    text: String,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// The name that libtpu knows, and chips along each axis.
    Tpu { name: String, bounds: Vec<usize> },
    /// The description, where it is from, and groups × hosts × devices.
    Gpu { description: String, from: String, shape: [usize; 3] },
    /// Devices; as many as the mesh has if `None`.
    Cpu { devices: Option<usize> },
}

impl Target {
    /// Reads a target. `description` is the file of a GPU's description, instead of the one that ships.
    ///
    /// # Errors
    /// [`Error::Option`] for what is no target, with those that are known; [`Error::Io`] for a file that cannot be read.
    pub fn parse(text: &str, description: Option<&Path>) -> Result<Target, Error> {
        let kind = Kind::parse(text, description)?;
        Ok(Target { text: text.to_string(), kind })
    }

    /// The plugin that compiles for it.
    pub fn plugin(&self) -> PluginKind {
        match self.kind {
            Kind::Tpu { .. } => PluginKind::Tpu,
            Kind::Gpu { .. } => PluginKind::Cuda,
            Kind::Cpu { .. } => PluginKind::Cpu,
        }
    }

    /// How many devices it has, by its name; as many as one likes if `None`.
    pub fn devices(&self) -> Option<usize> {
        match &self.kind {
            Kind::Tpu { name, bounds } => {
                Some(bounds.iter().product::<usize>() * chips::named(name).map_or(1, |chip| chip.devices))
            }
            Kind::Gpu { shape, .. } => Some(shape.iter().product()),
            Kind::Cpu { devices } => *devices,
        }
    }

    /// Describes its devices with the plugin in the file `plugin`. A CPU has `devices` where its name does not say.
    ///
    /// # Errors
    /// [`Error::Pjrt`] for a plugin that cannot be opened, [`Error::Option`] for a target that it does not know,
    /// [`Error::Device`] where it lacks tools.
    pub fn open(&self, plugin: &Path, devices: usize) -> Result<Machine, Error> {
        let plugin = Plugin::load(plugin)?;
        let refused = |e: xla::pjrt::Error, known: String| unknown(&self.text, &format!("{e}; {known}"));
        let place = match &self.kind {
            Kind::Tpu { name, bounds } => {
                let options = tpu_options(name, bounds);
                let name = format!("{name}:{}", shape(bounds));
                let topology = plugin.topology(&name, &options);
                Place::Topology(topology.map_err(|e| refused(e, format!("this libtpu knows {}", tpus(&plugin))))?)
            }
            Kind::Gpu { description, from, shape: bounds } => {
                let options =
                    [("target_config", Value::from(description.as_str())), ("topology", shape(bounds).into())];
                let topology = plugin.topology("", &options);
                Place::Topology(topology.map_err(|e| refused(e, format!("the description is {from}")))?)
            }
            Kind::Cpu { devices: own } => {
                let count = own.unwrap_or(devices) as i64;
                Place::Client(plugin.client(&[("cpu_device_count", Value::from(count))])?)
            }
        };
        let machine = Machine::new(self.clone(), plugin, place)?;
        if let Kind::Gpu { .. } = self.kind {
            machine.try_tools()?;
        }
        Ok(machine)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Kind {
    fn parse(text: &str, description: Option<&Path>) -> Result<Kind, Error> {
        let (name, rest) = match text.rsplit_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => match text.rsplit_once('x') {
                Some((name, count)) if is_number(count) && !is_number(name) => (name, Some(count)),
                _ => (text, None),
            },
        };
        let name = name.to_ascii_lowercase();
        let bounds = |dims: &[usize]| axes(text, rest, dims);
        if name == "cpu" && description.is_none() {
            return Ok(Kind::Cpu { devices: if rest.is_some() { Some(bounds(&[1])?[0]) } else { None } });
        }
        let shipped = GPUS.iter().find(|(gpu, _)| *gpu == name);
        let path = text.rsplit_once(':').filter(|(_, b)| b.starts_with(|c: char| c.is_ascii_digit()));
        let path = PathBuf::from(path.map_or(text, |(path, _)| path));
        let is_file = path.extension().is_some_and(|e| e == "textproto" || e == "txtpb" || e == "pbtxt");
        let file = description.map(Path::to_path_buf).or_else(|| is_file.then_some(path));
        if shipped.is_some() || is_file || (name == "gpu" && file.is_some()) {
            let axes = if text.contains(':') || (!is_file && rest.is_some()) { bounds(&[1, 3])? } else { vec![1] };
            let shape =
                if let [groups, hosts, devices] = axes[..] { [groups, hosts, devices] } else { [1, 1, axes[0]] };
            let (description, from) = match (file, shipped) {
                (Some(file), _) => (read_description(&file)?, file.display().to_string()),
                (None, Some((gpu, description))) => (description.to_string(), gpu.to_string()),
                (None, None) => return Err(unknown(text, "no description of that GPU is known")),
            };
            return Ok(Kind::Gpu { description, from, shape });
        }
        if description.is_some() {
            return Err(unknown(text, "a description of a device is for a GPU: h100, h200, b200 or gpu"));
        }
        // What newer libtpu knows and this program does not has a name like those that it does know.
        let digit = name.strip_prefix("tpu").or(name.strip_prefix('v')).and_then(|rest| rest.chars().next());
        if digit.is_some_and(|c| c.is_ascii_digit()) && name.chars().all(|c| c.is_ascii_alphanumeric()) {
            if !text.contains(':') {
                return Err(unknown(text, "a TPU needs the shape of its slice, such as v5e:2x4"));
            }
            let name = if name == "v7x" { "tpu7x".to_string() } else { name };
            return Ok(Kind::Tpu { name, bounds: bounds(&[2, 3])? });
        }
        Err(unknown(text, "no plugin compiles for that"))
    }
}

/// The axes of a shape, each at least 1: libtpu divides by them.
fn axes(text: &str, shape: Option<&str>, wanted: &[usize]) -> Result<Vec<usize>, Error> {
    let parsed: Option<Vec<usize>> =
        shape.unwrap_or_default().split('x').map(|n| n.parse().ok().filter(|n| *n > 0)).collect();
    let total = parsed.iter().flatten().try_fold(1usize, |total, n| total.checked_mul(*n));
    match (parsed, total) {
        (Some(axes), Some(total)) if wanted.contains(&axes.len()) && total <= MAX_DEVICES => Ok(axes),
        _ => {
            let counts: Vec<&str> = wanted.iter().map(|n| ["N", "NxN", "NxNxN"][n - 1]).collect();
            let what = format!(
                "the shape after the name must be {}, each at least 1 and {MAX_DEVICES} devices at most, found {:?}",
                counts.join(" or "),
                shape.unwrap_or_default()
            );
            Err(unknown(text, &what))
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// `[2, 4]` as `2x4`.
fn shape(bounds: &[usize]) -> String {
    bounds.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

/// An error that says what there is.
fn unknown(text: &str, what: &str) -> Error {
    let kinds: Vec<&str> = CHIPS.iter().filter(|chip| chip.clock.is_some()).map(|chip| chip.name).collect();
    let gpus: Vec<&str> = GPUS.iter().map(|(name, _)| *name).collect();
    let what = format!(
        "{text}: {what}. Known are slices of TPUs such as v5e:2x4 or v5p:2x2x4 ({}), GPUs such as h200 or h200x8 ({}), a file \
         that describes a GPU (.textproto), and cpu",
        kinds.join(", "),
        gpus.join(", ")
    );
    Error::Option { name: "target".into(), what }
}

/// The kinds of which this libtpu can describe one chip, newest last.
fn tpus(plugin: &Plugin) -> String {
    let kinds = CHIPS.iter().filter(|chip| chip.clock.is_some());
    let known = kinds.filter(|chip| plugin.topology(&format!("{}:1x1x1", chip.name), &[]).is_ok());
    known.map(|chip| chip.name).collect::<Vec<_>>().join(", ")
}

/// What libtpu must be told beside the shape.
fn tpu_options(name: &str, bounds: &[usize]) -> Vec<(&'static str, Value)> {
    let mut options = Vec::new();
    if name == "v4" {
        // As on a machine: both cores of a chip are one device. libtpu's default is two.
        options.push(("chip_config_name", Value::from("megacore")));
    }
    if matches!(name, "v5e" | "v6e") && (5..=8).contains(&bounds.iter().product::<usize>()) {
        // Up to 8 chips of these are on one host. libtpu's default is 4 to a host, as in larger slices.
        let host: Vec<i64> = bounds.iter().copied().chain([1, 1]).take(3).map(|n| n as i64).collect();
        options.push(("chips_per_host_bounds", Value::from(host)));
    }
    options
}

/// A description of a GPU that has what the compiler needs.
fn read_description(path: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(path).map_err(Error::io("reading", path))?;
    let missing =
        ["gpu_device_info", "device_memory_size", "cuda_compute_capability"].iter().find(|k| !text.contains(**k));
    match missing {
        None => Ok(text),
        Some(key) => Err(Error::Option {
            name: "target-config".into(),
            what: format!("{}: a GpuTargetConfigProto in text form is needed; {key} is not in it", path.display()),
        }),
    }
}

/// The devices of a target as the plugin describes them, ready to be compiled for.
pub struct Machine {
    target: Target,
    plugin: Plugin,
    place: Place,
    /// The plugin's name of the devices.
    pub kind: String,
    /// How many devices there are.
    pub devices: usize,
    /// How many processes drive them.
    pub hosts: usize,
    /// Bytes of memory that programs can use on one device, where that is known.
    pub limit: Option<u64>,
    /// What the devices can do, where that is known.
    pub chip: Option<&'static Chip>,
    /// The plugin's own words about its version.
    pub version: String,
    /// `cpu`, `cuda`, `tpu`.
    pub platform: String,
    described: Vec<DeviceDescription>,
}

enum Place {
    Topology(Topology),
    Client(Client),
}

/// A program that was compiled for a machine.
pub enum Compiled {
    /// For devices that need not be there.
    Described(Executable),
    /// For the processor of this machine.
    Loaded(LoadedExecutable),
}

impl std::ops::Deref for Compiled {
    type Target = Executable;

    fn deref(&self) -> &Executable {
        match self {
            Compiled::Described(executable) => executable,
            Compiled::Loaded(executable) => executable,
        }
    }
}

impl Machine {
    fn new(target: Target, plugin: Plugin, place: Place) -> Result<Machine, Error> {
        let (described, version, platform) = match &place {
            Place::Topology(t) => (t.devices()?, t.platform_version()?, t.platform_name()?),
            Place::Client(c) => {
                let devices = c.devices().iter().map(|d| d.description().clone()).collect();
                (devices, c.platform_version().to_string(), c.platform_name().to_string())
            }
        };
        let Some(first) = described.first() else {
            let name = target.text.clone();
            return Err(Error::Device { name, what: "the plugin describes no device of this target".into() });
        };
        let chip = match &target.kind {
            Kind::Cpu { .. } => None,
            Kind::Tpu { name, .. } => chips::named(name),
            Kind::Gpu { .. } => CHIPS.iter().find(|chip| first.kind.starts_with(chip.kind)),
        };
        let limit = match first.attributes.get("device_memory_bytes_limit") {
            Some(Value::Int(bytes)) => u64::try_from(*bytes).ok(),
            _ => chip.map(|chip| chip.hbm_bytes),
        };
        let kind = first.kind.clone();
        let hosts = match &target.kind {
            // The CUDA plugin describes all devices as one process's.
            Kind::Gpu { shape: [groups, hosts, _], .. } => groups * hosts,
            _ => described.iter().map(|d| d.process_index).max().unwrap_or(0) as usize + 1,
        };
        let devices = described.len();
        Ok(Machine { target, plugin, place, kind, devices, hosts, limit, chip, version, platform, described })
    }

    /// What it was made of.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The plugin that compiles.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// The kernels that programs for it may call.
    pub fn kernels(&self) -> &'static [&'static str] {
        match self.place {
            Place::Topology(_) => &[],
            Place::Client(_) => register_kernels(&self.plugin),
        }
    }

    /// The devices one by one.
    pub fn described(&self) -> &[DeviceDescription] {
        &self.described
    }

    /// Packages of devices: what one pays for.
    pub fn chips(&self) -> usize {
        self.devices.div_ceil(self.chip.map_or(1, |chip| chip.devices))
    }

    /// The same options with what this target needs beside them.
    pub fn options(&self, mut options: CompileOptions) -> CompileOptions {
        if let Kind::Gpu { .. } = self.target.kind {
            // Nothing can be tried out without the device, and the tiles of products come out tiny by default.
            let name = "xla_gpu_experimental_cost_model_gemm_tiling_default";
            options.env_options.insert(name.into(), OptionOverride::Bool(true));
        }
        options
    }

    /// Compiles a program.
    ///
    /// # Errors
    /// [`Error::Pjrt`]: what the compiler says, one that the program does not fit included
    /// ([`is_shortage`](super::memory::is_shortage)).
    pub fn compile(&self, stablehlo: &str, options: &CompileOptions) -> Result<Compiled, Error> {
        let compiled = match &self.place {
            Place::Topology(topology) => self.plugin.compile_for(topology, stablehlo, options).map(Compiled::Described),
            Place::Client(client) => client.compile(stablehlo, options).map(Compiled::Loaded),
        };
        Ok(compiled?)
    }

    /// Compiles a program of one operation, to see that the CUDA plugin finds its tools: with a large one, whose kernels it
    /// compiles side by side, the process would end where they are missing.
    fn try_tools(&self) -> Result<(), Error> {
        let program = "func.func @main(%x: tensor<8xf32>) -> tensor<8xf32> {\n  %y = stablehlo.tanh %x : tensor<8xf32>\n  \
                       return %y : tensor<8xf32>\n}\n";
        let tried = self.compile(program, &self.options(CompileOptions::default()));
        tried.map(drop).map_err(|e| match e.to_string() {
            text if text.contains("ptxas") || text.contains("libdevice") => Error::Device {
                name: self.plugin.path().display().to_string(),
                what: "the CUDA plugin finds no ptxas or no libdevice, without which it compiles nothing: `xllama plugin install \
                       cuda` fetches a plugin with them, or give the plugin of a Python environment with JAX for CUDA as \
                       --device (site-packages/jax_plugins/xla_cuda13/xla_cuda_plugin.so)"
                    .into(),
            },
            _ => e,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn tpu(text: &str) -> (String, Vec<usize>, Option<usize>) {
        let target = Target::parse(text, None).unwrap_or_else(|e| panic!("{text}: {e}"));
        let devices = target.devices();
        match target.kind {
            Kind::Tpu { name, bounds } => (name, bounds, devices),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn slices_of_tpus() {
        assert_eq!(tpu("v5e:2x4"), ("v5e".into(), vec![2, 4], Some(8)));
        assert_eq!(tpu("v5p:2x2x4"), ("v5p".into(), vec![2, 2, 4], Some(16)));
        assert_eq!(tpu("V6E:16x16"), ("v6e".into(), vec![16, 16], Some(256)));
        // Two devices to a chip, and the name that people use.
        assert_eq!(tpu("v7x:2x2x1"), ("tpu7x".into(), vec![2, 2, 1], Some(8)));
        // What a newer libtpu may know.
        assert_eq!(tpu("v9z:1x1"), ("v9z".into(), vec![1, 1], Some(1)));
    }

    #[test]
    fn gpus_and_cpus() {
        for (text, devices) in
            [("h200", 1), ("H100x8", 8), ("b200:4", 4), ("h200:2x1x8", 16), ("cpu:2", 2), ("cpux4", 4)]
        {
            let target = Target::parse(text, None).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(target.devices(), Some(devices), "{text}");
        }
        assert_eq!(Target::parse("cpu", None).expect("a target").devices(), None);
    }

    #[test]
    fn a_gpu_of_ones_own_is_read_from_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("mine.textproto");
        fs::write(&file, GPUS[1].1.replace("H200", "H2O")).expect("writable");
        let text = file.to_str().expect("UTF-8").to_string();
        for (target, description, devices) in [
            (text.clone(), None, 1),
            (format!("{text}:1x1x4"), None, 4),
            ("gpux2".to_string(), Some(file.as_path()), 2),
            ("h100".to_string(), Some(file.as_path()), 1),
        ] {
            let parsed = Target::parse(&target, description).unwrap_or_else(|e| panic!("{target}: {e}"));
            assert_eq!(parsed.devices(), Some(devices), "{target}");
            let Kind::Gpu { description, .. } = parsed.kind else { panic!("{target}") };
            assert!(description.contains("H2O"));
        }
        fs::write(&file, "name: \"a GPU\"").expect("writable");
        let error = Target::parse(&text, None).expect_err("not a description").to_string();
        assert!(error.starts_with("--target-config ") && error.contains("gpu_device_info"), "{error}");
        let error = Target::parse("none.textproto", None).expect_err("no such file").to_string();
        assert!(error.starts_with("reading none.textproto"), "{error}");
        // A description is of a GPU.
        assert!(Target::parse("v5e:1x1", Some(&file)).is_err() && Target::parse("cpu", Some(&file)).is_err());
    }

    #[test]
    fn what_is_no_target_is_refused_with_those_that_are() {
        for text in [
            "",
            "v5e",
            "v5e:",
            "v5e:8",
            "v5e:0x4",
            "v5e:-1x2",
            "v5e:2x2x2x2",
            "v5e:99999x99999",
            "v5e:2x18446744073709551616",
            "h300",
            "h200:",
            "h200:2x4",
            "h200x0",
            "gpu",
            "cpu:0",
            "cpu:2x2",
            "x",
            ":",
            "banana:2x2",
            "v:2x2",
            "v5 e:2x2",
            "vé:1x1",
        ] {
            let error = Target::parse(text, None).expect_err(text);
            assert!(matches!(&error, Error::Option { name, .. } if name == "target"), "{text}: {error}");
            let message = error.to_string();
            assert!(["v5e", "tpu7x", "h200", "cpu"].iter().all(|known| message.contains(known)), "{message}");
        }
    }

    #[test]
    fn the_hosts_of_a_slice_are_those_that_one_can_rent() {
        let host = |name, bounds: &[usize]| {
            let options = tpu_options(name, bounds);
            options.into_iter().find(|(key, _)| *key == "chips_per_host_bounds").map(|(_, value)| value)
        };
        assert_eq!(host("v6e", &[2, 4]), Some(Value::IntList(vec![2, 4, 1])));
        assert_eq!(host("v6e", &[4, 4]), None);
        assert_eq!(host("v5e", &[2, 2]), None);
        assert_eq!(host("v5p", &[2, 2, 2]), None);
    }

    #[test]
    fn the_descriptions_that_ship_are_those_of_the_chip_table() {
        for (name, text) in GPUS {
            let chip = chips::named(name).unwrap_or_else(|| panic!("{name} has no figures"));
            let number = |key: &str| -> f64 {
                let line = text.lines().find_map(|line| line.trim().strip_prefix(key)).expect("a field");
                line.trim_start_matches(':').trim().parse().expect("a number")
            };
            assert!((number("memory_bandwidth") / chip.hbm_bandwidth - 1.0).abs() < 0.01, "{name}");
            assert!((number("device_memory_size") / chip.hbm_bytes as f64 - 1.0).abs() < 0.07, "{name}");
            assert!(text.contains(&format!("\"{}", chip.kind)), "{name}");
        }
    }
}
