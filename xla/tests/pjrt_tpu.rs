//! Pins compiling for TPUs that are not there, where libtpu is installed (`xllama plugin install tpu`) or
//! `XLA_TEST_LIBTPU` names it; passes without doing anything elsewhere.

use std::path::PathBuf;
use xla::pjrt::{CompileOptions, Plugin};
use xla::wheel::{FetchOptions, PluginKind, builds, installed};

const MLP: &str = r#"
sdy.mesh @mesh = <["model"=4]>
func.func @main(%x: tensor<8x1024xbf16>,
                %a: tensor<1024x4096xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"model"}]>},
                %b: tensor<4096x1024xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{"model"}, {}]>})
    -> tensor<8x1024xbf16> {
  %h = stablehlo.dot_general %x, %a, contracting_dims = [1] x [0]
    : (tensor<8x1024xbf16>, tensor<1024x4096xbf16>) -> tensor<8x4096xbf16>
  %t = stablehlo.tanh %h : tensor<8x4096xbf16>
  %y = stablehlo.dot_general %t, %b, contracting_dims = [1] x [0]
    : (tensor<8x4096xbf16>, tensor<4096x1024xbf16>) -> tensor<8x1024xbf16>
  return %y : tensor<8x1024xbf16>
}"#;

fn libtpu() -> Option<PathBuf> {
    let named = std::env::var_os("XLA_TEST_LIBTPU").map(PathBuf::from);
    named.or_else(|| builds(PluginKind::Tpu).find_map(|build| installed(build, &FetchOptions::default())))
}

#[test]
fn a_sharded_program_compiles_without_a_tpu() {
    let Some(path) = libtpu() else { return println!("skipped: libtpu is not installed") };
    let plugin = Plugin::load(path).unwrap();
    for name in ["v5e:2x2", "v6e:2x2"] {
        let topology = plugin.topology(name, &[]).unwrap();
        assert_eq!(topology.platform_name().unwrap(), "tpu");
        let devices = topology.devices().unwrap();
        assert_eq!(devices.len(), 4);
        println!("{name}: {:?} {:?}", devices[0], topology.attributes().unwrap());
        let exe = plugin.compile_for(&topology, MLP, &CompileOptions::sharded(4)).unwrap();
        let stats = exe.memory_stats().unwrap();
        println!("{stats:?}");
        // One device holds x and a quarter of both weights.
        let expected = (8 * 1024 + 2 * 1024 * 1024) * 2;
        assert!((expected..expected + 65536).contains(&stats.argument), "{stats:?}");
        assert_eq!(exe.num_partitions().unwrap(), 4);
        let optimized = exe.optimized_program().unwrap();
        assert_eq!(optimized.format, "hlo_with_config");
        assert!(!exe.serialize().unwrap().is_empty());
        println!("{:?}", exe.cost_analysis().map(|c| c.len()));
    }
    assert!(plugin.topology("v9z:1x1", &[]).is_err());
}
