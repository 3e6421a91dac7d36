//! The PJRT plugins that ride in wheels: one table, and their installation.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::error::io;
use super::{FetchOptions, Job, Progress, Stage, Wheel, WheelError, fetch, store};

/// The kinds of devices that a plugin can be installed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PluginKind {
    /// The host's processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// Google TPUs; also compiles for them without one.
    Tpu,
}

impl PluginKind {
    /// Every kind.
    pub const ALL: [PluginKind; 3] = [PluginKind::Cpu, PluginKind::Cuda, PluginKind::Tpu];
}

impl fmt::Display for PluginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PluginKind::Cpu => "cpu",
            PluginKind::Cuda => "cuda",
            PluginKind::Tpu => "tpu",
        })
    }
}

/// A word that names no [`PluginKind`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected cpu, cuda or tpu, found \"{0}\"")]
pub struct ParsePluginKindError(String);

impl FromStr for PluginKind {
    type Err = ParsePluginKindError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let found = PluginKind::ALL.into_iter().find(|kind| kind.to_string() == word);
        found.ok_or_else(|| ParsePluginKindError(word.to_string()))
    }
}

/// One build of a plugin: the wheel that holds it, and those of the libraries it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Build {
    /// Name to choose it by: the package of its plugin.
    pub name: &'static str,
    /// What it drives.
    pub kind: PluginKind,
    /// Where it runs: `system-architecture` in the spelling of [`std::env::consts`].
    pub platform: &'static str,
    /// PJRT C API version that it implements (major, minor).
    pub api: (i32, i32),
    /// One sentence for a list.
    pub about: &'static str,
    /// The first holds the plugin (its `member`); all are unpacked into one folder.
    pub wheels: &'static [Wheel<'static>],
}

impl Build {
    /// Version of the plugin's package.
    pub fn version(&self) -> &'static str {
        self.wheels[0].version
    }

    /// Bytes to download when nothing is there yet.
    pub fn download_bytes(&self) -> u64 {
        self.wheels.iter().map(|wheel| wheel.bytes).sum()
    }

    /// Path of the plugin inside its folder.
    fn plugin(&self) -> &'static str {
        self.wheels[0].member
    }

    /// Name of the folder that joins the wheels of a set, and what it is made from.
    fn set(&self) -> (String, String) {
        let hashes: Vec<&str> = self.wheels.iter().map(|wheel| wheel.sha256).collect();
        (format!("{}-set", self.wheels[0].name()), hashes.join(" "))
    }
}

/// Every build of a kind, for all platforms; the first of a platform is its default.
pub fn builds(kind: PluginKind) -> impl Iterator<Item = &'static Build> {
    BUILDS.iter().filter(move |build| build.kind == kind)
}

/// The build of a kind to use on this machine where nothing else is asked for.
///
/// # Errors
/// [`WheelError::NoBuild`] where none is known for this platform; it lists those that exist.
pub fn default_build(kind: PluginKind) -> Result<&'static Build, WheelError> {
    default_for(kind, &format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH))
}

fn default_for(kind: PluginKind, platform: &str) -> Result<&'static Build, WheelError> {
    builds(kind).find(|build| build.platform == platform).ok_or_else(|| {
        let available: Vec<String> =
            builds(kind).map(|build| format!("{} {} ({})", build.name, build.version(), build.platform)).collect();
        WheelError::NoBuild { kind, platform: platform.to_string(), available: available.join(", ") }
    })
}

/// The plugin file of a build that is already there, whole; nothing is written or fetched.
pub fn installed(build: &Build, options: &FetchOptions) -> Option<PathBuf> {
    if let [wheel] = build.wheels {
        return fetch::fetched(wheel, options).map(|folder| folder.join(build.plugin()));
    }
    let (name, stamp) = build.set();
    let folder = options.wheels_dir().ok()?.join(name);
    store::is_complete(&folder, &stamp, build.plugin()).then(|| folder.join(build.plugin()))
}

/// Fetches what a build needs and returns the path of its plugin file. Returns at once where it is installed.
///
/// The wheels of a set are fetched one by one, so that an interrupted download goes on at the wheel it was at, then
/// joined in `<cache>/wheels/<package>-<version>-set` by hard links, which take no space.
///
/// # Errors
/// [`WheelError::Plugin`] around the cause, or [`WheelError::Cancelled`].
pub fn install(
    build: &Build,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, WheelError> {
    if let Some(plugin) = installed(build, options) {
        return Ok(plugin);
    }
    let folder = install_wheels(build, options, progress).map_err(|error| match error {
        WheelError::Cancelled { .. } => error,
        cause => WheelError::Plugin { build: build.name.to_string(), cause: Box::new(cause) },
    })?;
    Ok(folder.join(build.plugin()))
}

fn install_wheels(
    build: &Build,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, WheelError> {
    let parts = build.wheels.len();
    let mut folders = Vec::with_capacity(parts);
    for (index, wheel) in build.wheels.iter().enumerate() {
        folders.push(fetch::fetch_part(wheel, index + 1, parts, options, progress)?);
    }
    if let [folder] = &mut folders[..] {
        return Ok(std::mem::take(folder));
    }
    let (name, stamp) = build.set();
    let mut job = Job { what: &name, part: parts, parts, cancel: options.cancel.as_deref(), report: progress };
    store::publish(&options.wheels_dir()?, &name, &stamp, build.plugin(), &mut job, |content, _, job| {
        for folder in &folders {
            link_tree(folder, content, job)?;
        }
        Ok(())
    })
}

/// Gives every file below `from` a second name below `to`; copies where the file system has no hard links. Where two
/// wheels hold the same path (an empty `__init__.py`), the first one stays.
fn link_tree(from: &Path, to: &Path, job: &mut Job<'_>) -> Result<(), WheelError> {
    job.tick(Stage::Joining, 0, None)?;
    fs::create_dir_all(to).map_err(io("creating", to))?;
    for entry in fs::read_dir(from).map_err(io("reading", from))? {
        let entry = entry.map_err(io("reading", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(io("reading", &source))?.is_dir() {
            link_tree(&source, &target, job)?;
        } else if entry.file_name() != store::STAMP && !target.exists() && fs::hard_link(&source, &target).is_err() {
            fs::copy(&source, &target).map_err(io("copying a file to", &target))?;
        }
    }
    Ok(())
}

const LINUX: &str = "linux-x86_64";

/// Every known build. The order within a kind is the order of preference: for the CPU that of measured decode speed
/// (SmolLM2-135M, f32, two cores: 115 decodes about twice as fast as 106 and 81, whose small one-row products are slow,
/// and prefills at least as fast).
pub const BUILDS: &[Build] = &[
    Build {
        name: "lammps-jax-pjrt-cpu",
        kind: PluginKind::Cpu,
        platform: LINUX,
        api: (0, 115),
        about: "XLA for the CPU as in jaxlib 0.11.2",
        wheels: &[Wheel {
            package: "lammps-jax-pjrt-cpu",
            version: "0.11.2",
            file: "lammps_jax_pjrt_cpu-0.11.2-py3-none-manylinux_2_27_x86_64.whl",
            sha256: "1319390d948b39f69f7dade496b7c385149d9ca6097a6b62114da113216d9ad1",
            bytes: 62_711_338,
            member: "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so",
        }],
    },
    Build {
        name: "fastatomstruct-xla-cpu",
        kind: PluginKind::Cpu,
        platform: LINUX,
        api: (0, 106),
        about: "XLA for the CPU, an unmodified build of the zml project's artifacts",
        wheels: &[Wheel {
            package: "fastatomstruct-xla-cpu",
            version: "2026.6.23",
            file: "fastatomstruct_xla_cpu-2026.6.23-py3-none-manylinux_2_27_x86_64.whl",
            sha256: "88b1c430b341b4bea40a37420311c9c75db6e22b46d2ff95b6986577bee6afe9",
            bytes: 63_200_622,
            member: "fastatomstruct_xla_cpu/libpjrt_cpu.so",
        }],
    },
    Build {
        name: "xla-cpu-pjrt",
        kind: PluginKind::Cpu,
        platform: LINUX,
        api: (0, 81),
        about: "XLA for the CPU by the OpenXLA authors, November 2025",
        wheels: &[Wheel {
            package: "xla-cpu-pjrt",
            version: "0.0.1",
            file: "xla_cpu_pjrt-0.0.1-py3-none-manylinux_2_27_x86_64.whl",
            sha256: "55837b6b7b47daa717f2d9a5a03563ea0ceaa338d06a81a1e2d3f060d960decc",
            bytes: 63_461_052,
            member: "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so",
        }],
    },
    Build {
        name: "jax-cuda13-pjrt",
        kind: PluginKind::Cuda,
        platform: LINUX,
        api: (0, 116),
        about: "XLA for NVIDIA GPUs as in JAX 0.12, with CUDA 13.5 libraries",
        wheels: CUDA,
    },
    Build {
        name: "libtpu",
        kind: PluginKind::Tpu,
        platform: LINUX,
        api: (0, 117),
        about: "XLA for TPUs; compiles for them on any host",
        wheels: &[Wheel {
            package: "libtpu",
            version: "0.0.52",
            file: "libtpu-0.0.52-cp311-cp311-manylinux_2_31_x86_64.whl",
            sha256: "f5e2e596eaea9357fbb5a6755a7a9007c6ab75bfde4a55191b03eff402971140",
            bytes: 137_064_406,
            member: "libtpu/libtpu.so",
        }],
    },
];

/// The plugin looks for its libraries and for `ptxas` two folders above itself: `nvidia/cu13`, `nvidia/cudnn`,
/// `nvidia/nccl`.
const CUDA: &[Wheel<'static>] = &[
    Wheel {
        package: "jax-cuda13-pjrt",
        version: "0.12.0.1",
        file: "jax_cuda13_pjrt-0.12.0.1-py3-none-manylinux_2_27_x86_64.whl",
        sha256: "5899bb6177eda86ea532afb9a26794f2bdd04966f6a01f9028266b16c2b6cf90",
        bytes: 134_922_808,
        member: "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
    },
    Wheel {
        package: "nvidia-cublas",
        version: "13.10.0.20",
        file: "nvidia_cublas-13.10.0.20-py3-none-manylinux1_x86_64.manylinux_2_5_x86_64.whl",
        sha256: "dcc6d63884c53d07e267ce7e6feac17b2538cebaafec5db865736c3e28e4dc84",
        bytes: 444_289_903,
        member: "nvidia/cu13/lib/libcublasLt.so.13",
    },
    Wheel {
        package: "nvidia-cuda-crt",
        version: "13.5.37",
        file: "nvidia_cuda_crt-13.5.37-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "e898b7f73d3035fa89915a3f7bf3b54a73e90249746111aed295822c4729bb29",
        bytes: 166_163,
        member: "nvidia/cu13/include/crt/host_defines.h",
    },
    Wheel {
        package: "nvidia-cuda-cupti",
        version: "13.5.25",
        file: "nvidia_cuda_cupti-13.5.25-py3-none-manylinux_2_25_x86_64.whl",
        sha256: "9dcca41c12a734192b14e7128ae116bc9ce1b9da686e2ebf48ae7a4415f76650",
        bytes: 12_592_974,
        member: "nvidia/cu13/lib/libcupti.so.13",
    },
    Wheel {
        package: "nvidia-cuda-nvcc",
        version: "13.5.37",
        file: "nvidia_cuda_nvcc-13.5.37-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "f5c4f7ead5d964fb4af42bbf1e6d3ec3c1e6e9d83b53749f691d387e7fcaa3a7",
        bytes: 47_028_279,
        member: "nvidia/cu13/bin/ptxas",
    },
    Wheel {
        package: "nvidia-cuda-nvrtc",
        version: "13.5.37",
        file: "nvidia_cuda_nvrtc-13.5.37-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
        sha256: "86b4d68058807988b7d9af5b44917a0601e9c337f35ccd657bfb3c759ff8d8bc",
        bytes: 58_185_930,
        member: "nvidia/cu13/lib/libnvrtc.so.13",
    },
    Wheel {
        package: "nvidia-cuda-runtime",
        version: "13.5.37",
        file: "nvidia_cuda_runtime-13.5.37-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "df2b79a8852f10d1fef8c848489c49eebb5754051bf870202a862831412b179d",
        bytes: 2_504_024,
        member: "nvidia/cu13/lib/libcudart.so.13",
    },
    Wheel {
        package: "nvidia-cudnn-cu13",
        version: "9.28.0.42",
        file: "nvidia_cudnn_cu13-9.28.0.42-py3-none-manylinux_2_27_x86_64.whl",
        sha256: "7358353c75bb121a58e5f7712fe6d588883dc1df8ba00f428237e44e97543c4d",
        bytes: 516_782_127,
        member: "nvidia/cudnn/lib/libcudnn.so.9",
    },
    Wheel {
        package: "nvidia-cufft",
        version: "12.5.0.14",
        file: "nvidia_cufft-12.5.0.14-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "b8be26837a5abad2b5b74f3e92dd29f622a42934b355be0961a48712cbba23ad",
        bytes: 165_072_555,
        member: "nvidia/cu13/lib/libcufft.so.12",
    },
    Wheel {
        package: "nvidia-cusolver",
        version: "12.4.1.2",
        file: "nvidia_cusolver-12.4.1.2-py3-none-manylinux_2_27_x86_64.whl",
        sha256: "b3b8e02fd2f2df869369af075dc3a179d43f6f7b85e94632a7dce556697be044",
        bytes: 260_003_940,
        member: "nvidia/cu13/lib/libcusolver.so.12",
    },
    Wheel {
        package: "nvidia-cusparse",
        version: "12.9.4.2",
        file: "nvidia_cusparse-12.9.4.2-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "072667e58c851a318738f5527a12eb225cbf058803f2ea451c722d8cf8edddec",
        bytes: 230_422_857,
        member: "nvidia/cu13/lib/libcusparse.so.12",
    },
    Wheel {
        package: "nvidia-nccl-cu13",
        version: "2.32.3",
        file: "nvidia_nccl_cu13-2.32.3-py3-none-manylinux_2_27_x86_64.whl",
        sha256: "1459723080ac889d73a26edfa3e04383a7928ab31ac8f0ec43b3ea9548b04ff3",
        bytes: 305_100_071,
        member: "nvidia/nccl/lib/libnccl.so.2",
    },
    Wheel {
        package: "nvidia-nvjitlink",
        version: "13.5.37",
        file: "nvidia_nvjitlink-13.5.37-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
        sha256: "280d7cb9649704145f074b8dbde500de04ce02d0872e066e20a83c17bcaa93eb",
        bytes: 46_642_491,
        member: "nvidia/cu13/lib/libnvJitLink.so.13",
    },
    Wheel {
        package: "nvidia-nvshmem-cu13",
        version: "3.8.0",
        file: "nvidia_nvshmem_cu13-3.8.0-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "81a4d1f666543e6d34df6d2ff940c7da1435e34e186aab6f3c2b48861b64ef38",
        bytes: 182_092_449,
        member: "nvidia/nvshmem/lib/libnvshmem_host.so.3",
    },
    Wheel {
        package: "nvidia-nvvm",
        version: "13.5.37",
        file: "nvidia_nvvm-13.5.37-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
        sha256: "c41bfa362e407405163f103c2229f0765f8cc2ed7d148b754dc77f228bf7e070",
        bytes: 75_141_406,
        member: "nvidia/cu13/nvvm/libdevice/libdevice.10.bc",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        for build in BUILDS {
            assert_eq!(build.name, build.wheels[0].package);
            for wheel in build.wheels {
                wheel.check().unwrap();
                assert!(wheel.bytes > 100_000, "{}", wheel.package);
                let (file, package) = (wheel.file.to_lowercase(), wheel.package.replace('-', "_"));
                assert!(file.starts_with(&format!("{package}-{}-", wheel.version)), "{file}");
            }
        }
        let fields: [fn(&Wheel<'static>) -> &'static str; 3] = [|w| w.file, |w| w.sha256, |w| w.member];
        for field in fields {
            let mut all: Vec<_> = BUILDS.iter().flat_map(|b| b.wheels).map(field).collect();
            all.sort();
            let count = all.len();
            all.dedup();
            assert_eq!(all.len(), count);
        }
    }

    #[test]
    fn cuda_libraries_stand_where_the_plugin_looks() {
        let build = default_for(PluginKind::Cuda, LINUX).unwrap();
        assert_eq!(build.wheels.len(), 15);
        assert_eq!(Path::new(build.plugin()).components().count(), 3, "two folders above the plugin is the root");
        assert!(build.wheels[1..].iter().all(|wheel| wheel.member.starts_with("nvidia/")));
    }

    #[test]
    fn kinds_read_back() {
        for kind in PluginKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert!(builds(kind).count() > 0);
        }
        let error = "gpu".parse::<PluginKind>().unwrap_err();
        assert_eq!(error.to_string(), "expected cpu, cuda or tpu, found \"gpu\"");
    }

    #[test]
    fn a_platform_without_a_build_is_told_what_exists() {
        assert_eq!(default_for(PluginKind::Cpu, LINUX).unwrap().api, (0, 115));
        let message = default_for(PluginKind::Cpu, "macos-aarch64").unwrap_err().to_string();
        assert_eq!(
            message,
            "no cpu plugin is known for macos-aarch64; there is lammps-jax-pjrt-cpu 0.11.2 (linux-x86_64), \
             fastatomstruct-xla-cpu 2026.6.23 (linux-x86_64), xla-cpu-pjrt 0.0.1 (linux-x86_64). \
             A PJRT plugin that you have works as `--device PATH`"
        );
    }
}
