//! Pins what is read off the programs that compilers make: on every CPU plugin, and for TPU where libtpu is installed
//! (`xllama plugin install tpu`) or `XLA_TEST_LIBTPU` names it.

mod pjrt_support;

use pjrt_support::cpu_plugins;
use std::path::PathBuf;
use xla::hlo::{CollectiveKind, Module};
use xla::pjrt::{CompileOptions, Executable, Plugin, Value};
use xla::wheel::{FetchOptions, PluginKind, builds, installed};

/// Seven trips of an MLP whose F is split over four devices, so each trip has one all-reduce, and of a write into a
/// cache that the caller gives away; then a loop whose trips the caller decides.
const LOOPS: &str = r#"
sdy.mesh @mesh = <["model"=4]>
func.func @main(%x: tensor<8x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>},
                %up: tensor<256x512xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"model"}]>},
                %down: tensor<512x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"model"}, {}]>},
                %cache: tensor<64x8x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}, {}]>,
                                              tf.aliasing_output = 1 : i32},
                %n: tensor<i32>)
    -> (tensor<8x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>},
        tensor<64x8x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}, {}]>},
        tensor<8x256xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}) {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %one = stablehlo.constant dense<1> : tensor<i32>
  %seven = stablehlo.constant dense<7> : tensor<i32>
  %r:3 = stablehlo.while(%i = %zero, %v = %x, %k = %cache)
      : tensor<i32>, tensor<8x256xf32>, tensor<64x8x256xf32>
    cond {
      %p = stablehlo.compare LT, %i, %seven : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %p : tensor<i1>
    } do {
      %h = stablehlo.dot_general %v, %up, contracting_dims = [1] x [0]
        : (tensor<8x256xf32>, tensor<256x512xf32>) -> tensor<8x512xf32>
      %t = stablehlo.tanh %h : tensor<8x512xf32>
      %y = stablehlo.dot_general %t, %down, contracting_dims = [1] x [0]
        : (tensor<8x512xf32>, tensor<512x256xf32>) -> tensor<8x256xf32> loc("mlp/down")
      %u = stablehlo.reshape %y : (tensor<8x256xf32>) -> tensor<1x8x256xf32>
      %w = stablehlo.dynamic_update_slice %k, %u, %i, %zero, %zero
        : (tensor<64x8x256xf32>, tensor<1x8x256xf32>, tensor<i32>, tensor<i32>, tensor<i32>) -> tensor<64x8x256xf32>
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %y, %w : tensor<i32>, tensor<8x256xf32>, tensor<64x8x256xf32>
    }
  %z:2 = stablehlo.while(%i = %zero, %v = %x) : tensor<i32>, tensor<8x256xf32>
    cond {
      %p = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %p : tensor<i1>
    } do {
      %t = stablehlo.tanh %v : tensor<8x256xf32>
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %t : tensor<i32>, tensor<8x256xf32>
    }
  return %r#1, %r#2, %z#1 : tensor<8x256xf32>, tensor<64x8x256xf32>, tensor<8x256xf32>
}"#;

const CACHE_BYTES: u64 = 64 * 8 * 256 * 4;

fn read(exe: &Executable) -> Module {
    let program = exe.optimized_program().unwrap();
    Module::parse(&program.format, &program.bytes).unwrap_or_else(|e| panic!("{e}"))
}

/// The trips of all loops; those that depend on data last.
fn trips(module: &Module) -> Vec<Option<u64>> {
    let mut found = Vec::new();
    for (c, computation) in module.computations.iter().enumerate() {
        let loops = computation.instructions.iter().enumerate().filter(|(_, i)| i.opcode == "while");
        found.extend(loops.map(|(place, _)| module.trip_count(c, place)));
    }
    found.sort_by(|a, b| b.cmp(a));
    found
}

/// What holds on every platform.
fn check_loops(module: &Module) {
    assert_eq!(trips(module), [Some(7), None]);
    let [reduce] = &module.collectives()[..] else { panic!("{:?}", module.collectives()) };
    assert_eq!((reduce.kind, reduce.times, reduce.group_size), (CollectiveKind::AllReduce, 7, 4), "{reduce:?}");
    assert_eq!((reduce.bytes, reduce.op_name.as_str()), (8 * 256 * 4, "mlp/down"));
    let sum = module.collective_sums()[&CollectiveKind::AllReduce];
    assert_eq!((sum.count, sum.bytes), (7, 7 * 8 * 256 * 4));
    // x, a quarter of both weights, the cache and n.
    assert_eq!(module.parameter_bytes(), 8 * 256 * 4 + 2 * 256 * 128 * 4 + CACHE_BYTES + 4);
    let [alias] = &module.aliases[..] else { panic!("{:?}", module.aliases) };
    assert_eq!((&alias.output[..], alias.parameter), (&[1][..], 3));
    assert_eq!(module.opcode_counts()["while"], 2);
    // The cache is written in place.
    assert_eq!(module.copies(CACHE_BYTES), []);
}

#[test]
fn loops_and_collectives_on_four_cpu_devices() {
    for plugin in cpu_plugins() {
        println!("{}", plugin.path().display());
        let client = plugin.client(&[("cpu_device_count", Value::from(4i64))]).unwrap();
        let module = read(&client.compile(LOOPS, &CompileOptions::sharded(4)).unwrap());
        check_loops(&module);
        assert_eq!(module.cycles(), None);
    }
}

#[test]
fn a_cache_that_is_not_given_away_is_copied() {
    let kept = LOOPS.replace("tf.aliasing_output = 1 : i32", "test.kept");
    for plugin in cpu_plugins() {
        println!("{}", plugin.path().display());
        let client = plugin.client(&[("cpu_device_count", Value::from(4i64))]).unwrap();
        let module = read(&client.compile(&kept, &CompileOptions::sharded(4)).unwrap());
        assert_eq!(module.aliases, []);
        let copies = module.copies(CACHE_BYTES);
        assert!(!copies.is_empty() && copies.iter().all(|c| c.times == 1 && !c.between_memories), "{copies:?}");
    }
}

fn libtpu() -> Option<PathBuf> {
    let named = std::env::var_os("XLA_TEST_LIBTPU").map(PathBuf::from);
    named.or_else(|| builds(PluginKind::Tpu).find_map(|build| installed(build, &FetchOptions::default())))
}

#[test]
fn the_tpu_compilers_estimates_are_summed() {
    let Some(path) = libtpu() else { return println!("skipped: libtpu is not installed") };
    let plugin = Plugin::load(path).unwrap();
    for name in ["v5e:2x2", "v6e:2x2"] {
        let topology = plugin.topology(name, &[]).unwrap();
        let module = read(&plugin.compile_for(&topology, LOOPS, &CompileOptions::sharded(4)).unwrap());
        check_loops(&module);
        let (cycles, costs) = (module.cycles().unwrap(), module.costs());
        println!("{name}: {cycles:?} {costs:?}");
        assert_eq!(cycles.dynamic_loops, 1);
        assert_eq!(cycles.total, costs.iter().map(|cost| cost.total()).sum::<u64>());
        // The products are in the loop of seven trips.
        let product = costs.iter().find(|cost| cost.op_name == "mlp/down").unwrap();
        assert!(product.times == 7 && product.cycles > 0, "{product:?}");
        assert_eq!(module.unestimated()["all-reduce"], 7);
    }
}
