//! Pins the PJRT layer on every CPU plugin: copies, execution, donation, sharding, serialization, errors.

mod pjrt_support;

use pjrt_support::cpu_plugins;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use xla::DType;
use xla::pjrt::{Client, Code, CompileOptions, Error, ExecuteOptions, HostData, OptionOverride, Plugin, Value};

fn client(plugin: &Plugin, devices: i64) -> Client {
    plugin.client(&[("cpu_device_count", Value::from(devices))]).unwrap()
}

fn on_each(devices: i64, test: impl Fn(&Client)) {
    for plugin in cpu_plugins() {
        println!("{}", plugin.path().display());
        test(&client(&plugin, devices));
    }
}

fn one() -> CompileOptions {
    CompileOptions::default()
}

/// z = x + y in y's memory, and a constant.
const ADD: &str = "func.func @main(%x: tensor<2x3xf32>, %y: tensor<2x3xf32> {tf.aliasing_output = 0 : i32})
    -> (tensor<2x3xf32>, tensor<i32>) {
  %z = stablehlo.add %x, %y : tensor<2x3xf32>
  %c = stablehlo.constant dense<7> : tensor<i32>
  return %z, %c : tensor<2x3xf32>, tensor<i32>
}";

#[test]
fn a_plugin_is_loaded_once_and_describes_itself() {
    for plugin in cpu_plugins() {
        assert_eq!(Plugin::load(plugin.path()).unwrap(), plugin);
        let (major, minor) = plugin.api_version();
        assert!(major == 0 && minor >= 57, "{major}.{minor}");
        assert!(matches!(plugin.attributes()["stablehlo_current_version"], Value::IntList(_)));
        let client = client(&plugin, 3);
        assert_eq!((client.platform_name(), client.process_index()), ("cpu", 0));
        assert_eq!(client.devices().len(), 3);
        assert_eq!(client.addressable_devices(), client.devices());
        let ids: Vec<_> = client.devices().iter().map(|d| d.id()).collect();
        assert_eq!(ids, [0, 1, 2]);
        assert!(!client.devices()[0].memories().unwrap().is_empty());
        client.devices()[0].memory_stats().unwrap();
    }
}

#[test]
fn every_dtype_and_rank_survives_the_round_trip() {
    on_each(1, |client| {
        for dtype in DType::ALL {
            for dims in [&[][..], &[7], &[0, 3], &[2, 3, 5], &[1, 2, 1, 3, 2]] {
                let count: usize = dims.iter().product::<usize>() * dtype.size();
                let limit = match dtype {
                    DType::Pred => 2,
                    DType::I4 | DType::U4 => 8,
                    _ => 120,
                };
                let bytes: Vec<u8> = (0..count).map(|i| (i % limit) as u8).collect();
                let buffer = client.upload(HostData::Borrowed(&bytes), dtype, dims, None).unwrap();
                assert_eq!((buffer.dtype(), buffer.dims()), (dtype, dims));
                assert_eq!(buffer.to_host().unwrap(), bytes, "{dtype}{dims:?}");
                assert_eq!(buffer.to_host_async().unwrap().wait().unwrap(), bytes, "{dtype}{dims:?}");
                let shared = client.upload(HostData::Shared(Arc::new(bytes.clone())), dtype, dims, None).unwrap();
                assert_eq!(shared.to_host().unwrap(), bytes, "{dtype}{dims:?}");
            }
        }
        let flags = client.upload_slice(&[true, false, true], &[3], None).unwrap();
        assert_eq!(flags.to_vec::<bool>().unwrap(), [true, false, true]);
    });
}

#[test]
fn outputs_carry_their_shapes() {
    on_each(1, |client| {
        let text = "func.func @main(%x: tensor<3xf32>) -> (tensor<3xbf16>, tensor<i1>, tensor<2x3xui8>, tensor<4xi4>) {
          %a = stablehlo.convert %x : (tensor<3xf32>) -> tensor<3xbf16>
          %b = stablehlo.constant dense<true> : tensor<i1>
          %c = stablehlo.constant dense<[[1, 2, 3], [4, 5, 255]]> : tensor<2x3xui8>
          %d = stablehlo.constant dense<[-8, -1, 0, 7]> : tensor<4xi4>
          return %a, %b, %c, %d : tensor<3xbf16>, tensor<i1>, tensor<2x3xui8>, tensor<4xi4>
        }";
        let exe = client.compile(text, &one()).unwrap();
        let shapes: Vec<_> = exe.outputs().unwrap().into_iter().map(|s| (s.dtype, s.dims)).collect();
        let x = client.upload_slice(&[1f32, -2.5, 1e30], &[3], None).unwrap();
        let out = exe.execute(&[&x]).unwrap();
        let found: Vec<_> = out.iter().map(|b| (b.dtype(), b.dims().to_vec())).collect();
        assert_eq!(found, shapes);
        assert_eq!(found[2], (DType::U8, vec![2, 3]));
        let a: Vec<f32> = out[0].to_vec::<half::bf16>().unwrap().into_iter().map(|v| v.to_f32()).collect();
        assert_eq!(a[..2], [1.0, -2.5]);
        assert_eq!(out[1].to_vec::<bool>().unwrap(), [true]);
        assert_eq!(out[2].to_vec::<u8>().unwrap(), [1, 2, 3, 4, 5, 255]);
        let nibbles = out[3].to_host().unwrap();
        assert_eq!(nibbles.iter().map(|b| (*b as i8) << 4 >> 4).collect::<Vec<_>>(), [-8, -1, 0, 7]);
        assert!(out[1].to_vec::<u8>().unwrap_err().to_string().contains("holds i1[]"));
    });
}

#[test]
fn donation_deletes_the_argument() {
    on_each(1, |client| {
        let exe = client.compile(ADD, &one()).unwrap();
        let x = client.upload_slice(&[0f32, 1., 2., 3., 4., 5.], &[2, 3], None).unwrap();
        let y = client.upload_slice(&[10f32, 20., 30., 40., 50., 60.], &[2, 3], None).unwrap();
        let kept = exe.execute_with(&[&x, &y], &ExecuteOptions { non_donatable: vec![1], launch_id: 0 }).unwrap();
        assert!(!y.is_deleted().unwrap());
        assert_eq!(kept[0].to_vec::<f32>().unwrap(), [10., 21., 32., 43., 54., 65.]);

        let out = exe.execute(&[&x, &y]).unwrap();
        assert_eq!(out[0].to_vec::<f32>().unwrap(), [10., 21., 32., 43., 54., 65.]);
        assert_eq!(out[1].to_vec::<i32>().unwrap(), [7]);
        assert!(y.is_deleted().unwrap() && !x.is_deleted().unwrap());
        for error in [exe.execute(&[&x, &y]).unwrap_err(), y.to_host().unwrap_err()] {
            assert_eq!(error.code(), Some(Code::InvalidArgument));
            assert!(error.to_string().contains("deleted or donated"), "{error}");
        }
        assert_eq!(exe.memory_stats().unwrap().alias, 24);

        // A chain, as a cache is used: each output is the next input.
        let mut cache = client.upload_slice(&[0f32; 6], &[2, 3], None).unwrap();
        for _ in 0..100 {
            cache = exe.execute(&[&x, &cache]).unwrap().remove(0);
        }
        assert_eq!(cache.to_vec::<f32>().unwrap(), [0., 100., 200., 300., 400., 500.]);

        x.delete().unwrap();
        x.delete().unwrap();
        assert!(x.is_deleted().unwrap() && x.to_host().is_err());
    });
}

/// 64-byte aligned host memory that tells when it is dropped.
#[repr(C, align(64))]
struct Host {
    data: [u8; 4096],
    dropped: Arc<AtomicBool>,
}

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.data.fill(0xff);
        self.dropped.store(true, Ordering::SeqCst);
    }
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed().as_secs() < 20, "{what} did not happen");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn shared_host_memory_lives_as_long_as_the_buffer() {
    on_each(1, |client| {
        let text = "func.func @main(%x: tensor<1024xf32>) -> tensor<f32> {
          %z = stablehlo.constant dense<0.0> : tensor<f32>
          %s = stablehlo.reduce(%x init: %z) applies stablehlo.add across dimensions = [0]
            : (tensor<1024xf32>, tensor<f32>) -> tensor<f32>
          return %s : tensor<f32>
        }";
        let exe = client.compile(text, &one()).unwrap();
        let dropped = Arc::new(AtomicBool::new(false));
        let mut data = [0u8; 4096];
        data.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&1f32.to_le_bytes()));
        let host = Arc::new(Host { data, dropped: dropped.clone() });
        let x = client.upload(HostData::Shared(host), DType::F32, &[1024], None).unwrap();
        for _ in 0..10 {
            assert_eq!(exe.execute(&[&x]).unwrap()[0].to_vec::<f32>().unwrap(), [1024.0]);
        }
        assert!(!dropped.load(Ordering::SeqCst), "aligned memory is used in place");
        let last = exe.execute(&[&x]).unwrap();
        drop(x);
        assert_eq!(last[0].to_vec::<f32>().unwrap(), [1024.0]);
        eventually("giving back host memory", || dropped.load(Ordering::SeqCst));
    });
}

#[test]
fn shared_host_memory_is_not_written_by_donation() {
    on_each(1, |client| {
        let text = "func.func @main(%x: tensor<1024xf32> {tf.aliasing_output = 0 : i32}) -> tensor<1024xf32> {
          %y = stablehlo.add %x, %x : tensor<1024xf32>
          return %y : tensor<1024xf32>
        }";
        let exe = client.compile(text, &one()).unwrap();
        let mut data = [0u8; 4096];
        data.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&1f32.to_le_bytes()));
        let host = Arc::new(Host { data, dropped: Arc::default() });
        let x = client.upload(HostData::Shared(host.clone()), DType::F32, &[1024], None).unwrap();
        assert_eq!(exe.execute(&[&x]).unwrap()[0].to_vec::<f32>().unwrap(), [2.0; 1024]);
        assert_eq!(host.data, data);
    });
}

#[test]
fn four_devices_with_shardy_and_with_gspmd() {
    const SHARDY: &str = r#"
    sdy.mesh @mesh = <["d"=4]>
    func.func @main(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"d"}]>},
                    %w: tensor<8x2xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"d"}, {}]>})
        -> (tensor<4x2xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"d"}, {}]>}) {
      %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x2xf32>) -> tensor<4x2xf32>
      return %y : tensor<4x2xf32>
    }"#;
    const GSPMD: &str = r#"
    func.func @main(%x: tensor<4x8xf32> {mhlo.sharding = "{devices=[1,4]<=[4]}"},
                    %w: tensor<8x2xf32> {mhlo.sharding = "{devices=[4,1]<=[4]}"})
        -> (tensor<4x2xf32> {mhlo.sharding = "{devices=[4,1]<=[4]}"}) {
      %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x2xf32>) -> tensor<4x2xf32>
      return %y : tensor<4x2xf32>
    }"#;
    on_each(4, |client| {
        let gspmd = CompileOptions { use_shardy_partitioner: false, ..CompileOptions::sharded(4) };
        let reversed = CompileOptions { device_assignment: Some(vec![vec![3, 2, 1, 0]]), ..CompileOptions::sharded(4) };
        for (text, options) in [(SHARDY, CompileOptions::sharded(4)), (GSPMD, gspmd), (SHARDY, reversed)] {
            let exe = client.compile(text, &options).unwrap();
            let devices = exe.addressable_devices().unwrap();
            assert_eq!((devices.len(), exe.num_partitions().unwrap()), (4, 4));
            // x[i][k] = i + k, w[k][j] = k - j; device d holds columns 2d, 2d+1 of x and rows 2d, 2d+1 of w. The list
            // order is that of the devices, whose partition is their place in the assignment.
            let partition = |id: i32| match &options.device_assignment {
                Some(rows) => rows[0].iter().position(|&d| d == i64::from(id)).unwrap(),
                None => id as usize,
            };
            let mut args = Vec::new();
            for device in &devices {
                let k = 2 * partition(device.id());
                let x: Vec<f32> = (0..4).flat_map(|i| [(i + k) as f32, (i + k + 1) as f32]).collect();
                let w: Vec<f32> = (k..k + 2).flat_map(|k| [k as f32, k as f32 - 1.0]).collect();
                let x = client.upload_slice(&x, &[4, 2], Some(device)).unwrap();
                let w = client.upload_slice(&w, &[2, 2], Some(device)).unwrap();
                assert_eq!(x.device().unwrap(), *device);
                args.push((x, w));
            }
            let lists: Vec<_> = args.iter().map(|(x, w)| vec![x, w]).collect();
            let out = exe.execute_sharded(&lists).unwrap();
            for (device, out) in devices.iter().zip(&out) {
                let i = partition(device.id()) as f32;
                let expected: Vec<f32> =
                    (0..2).map(|j| (0..8).map(|k| (i + k as f32) * (k as f32 - j as f32)).sum()).collect();
                assert_eq!(out[0].dims(), [1, 2]);
                assert_eq!(out[0].to_vec::<f32>().unwrap(), expected);
                assert_eq!(out[0].device().unwrap(), *device);
            }
            let error = exe.execute_sharded(&lists[..3]).unwrap_err().to_string();
            assert!(error.contains("4 devices") && error.contains("[2, 2, 2]"), "{error}");
            assert!(exe.execute(&lists[0]).unwrap_err().to_string().contains("execute_sharded"));
        }
    });
}

#[test]
fn one_device_of_several() {
    on_each(4, |client| {
        let devices = client.devices();
        let exe = client.compile(ADD, &CompileOptions::on_device(2)).unwrap();
        assert_eq!(exe.addressable_devices().unwrap(), [devices[2].clone()]);
        let x = client.upload_slice(&[1f32; 6], &[2, 3], None).unwrap();
        assert_eq!(x.device().unwrap(), devices[0]);
        let there = x.copy_to_device(&devices[2]).unwrap();
        let y = client.upload_slice(&[2f32; 6], &[2, 3], Some(&devices[2])).unwrap();
        let out = exe.execute(&[&there, &y]).unwrap();
        assert_eq!(out[0].to_vec::<f32>().unwrap(), [3.0; 6]);
        assert_eq!(out[0].device().unwrap(), devices[2]);
        assert!(out[0].on_device_size().unwrap() >= 24);
    });
}

#[test]
fn serialized_programs_run_and_garbage_is_refused() {
    on_each(1, |client| {
        let exe = client.compile(ADD, &one()).unwrap();
        let bytes = exe.serialize().unwrap();
        let outputs = exe.outputs().unwrap();
        drop(exe);
        let exe = client.deserialize(&bytes).unwrap();
        assert_eq!(exe.outputs().unwrap(), outputs);
        let x = client.upload_slice(&[1f32; 6], &[2, 3], None).unwrap();
        let y = client.upload_slice(&[2f32; 6], &[2, 3], None).unwrap();
        assert_eq!(exe.execute(&[&x, &y]).unwrap()[0].to_vec::<f32>().unwrap(), [3.0; 6]);
        for garbage in [&b""[..], b"not a program", &bytes[..bytes.len() / 2], &[0xff; 100]] {
            assert!(client.deserialize(garbage).is_err());
        }
    });
}

#[test]
fn programs_are_described() {
    on_each(1, |client| {
        let exe = client.compile(&format!("module @sum {{ {ADD} }}"), &one()).unwrap();
        assert_eq!(exe.name().unwrap(), "sum");
        assert_eq!((exe.num_outputs().unwrap(), exe.num_replicas().unwrap(), exe.num_partitions().unwrap()), (2, 1, 1));
        let stats = exe.memory_stats().unwrap();
        assert_eq!(stats.argument, 48);
        assert!(stats.output >= 28);
        let optimized = exe.optimized_program().unwrap();
        assert!(optimized.format.starts_with("hlo") && optimized.bytes.len() > 100, "{}", optimized.format);
        exe.fingerprint().unwrap();
        match exe.cost_analysis() {
            Ok(costs) => assert_eq!(costs["flops"].as_f64(), Some(6.0)),
            Err(e) => assert!(e.is_unsupported(), "{e}"),
        }
    });
}

#[test]
fn a_topology_is_compiled_for_without_a_device() {
    on_each(2, |client| {
        let topology = client.topology().unwrap();
        assert_eq!(topology.platform_name().unwrap(), "cpu");
        assert_eq!(topology.devices().unwrap().len(), 2);
        match client.plugin().compile_for(&topology, ADD, &one()) {
            Ok(exe) => assert_eq!(exe.num_outputs().unwrap(), 2),
            Err(e) => println!("not on this plugin: {e}"),
        }
        let _ = client.plugin().topology("no such thing", &[]).is_ok();
    });
}

#[test]
fn bad_requests_are_errors() {
    on_each(1, |client| {
        let error = client.upload_slice(&[0f32; 5], &[2, 3], None).unwrap_err().to_string();
        assert_eq!(error, "an array f32[2, 3] has 24 bytes, the host data 20");
        assert!(client.upload(HostData::Borrowed(&[]), DType::F64, &[usize::MAX, 2], None).is_err());

        let error = client.compile("func.func @main(%x: tensor<2xf32>) { oops", &one()).unwrap_err();
        assert!(matches!(&error, Error::Plugin { doing: "compile a program", .. }), "{error}");
        for options in [CompileOptions::on_device(99), CompileOptions::sharded(4)] {
            let outcome = client.compile(ADD, &options);
            assert!(outcome.is_err(), "{options:?} on one device");
        }
        let mut options = one();
        options.env_options.insert("xla_no_such_option".into(), OptionOverride::Bool(true));
        assert!(client.compile(ADD, &options).unwrap_err().to_string().contains("xla_no_such_option"));
        let mut options = one();
        options.env_options.insert("xla_cpu_prefer_vector_width".into(), OptionOverride::Int(512));
        let exe = client.compile(ADD, &options).unwrap();

        let x = client.upload_slice(&[1f32; 6], &[2, 3], None).unwrap();
        let y = client.upload_slice(&[1i32; 6], &[2, 3], None).unwrap();
        let z = client.upload_slice(&[1f32; 4], &[4], None).unwrap();
        for args in [&[&x][..], &[&x, &z], &[&x, &y, &z], &[&z, &x]] {
            assert!(exe.execute(args).is_err(), "{args:?}");
        }
        let other = self::client(client.plugin(), 1);
        let foreign = other.upload_slice(&[1f32; 6], &[2, 3], None).unwrap();
        let error = exe.execute(&[&x, &foreign]).unwrap_err().to_string();
        assert_eq!(error, "argument 1 belongs to another client than the program");
        assert!(client.upload_slice(&[0f32], &[], Some(&other.devices()[0])).is_err());
        assert!(x.copy_to_device(&other.devices()[0]).is_err());
    });
}

#[test]
fn handles_outlive_what_they_came_from() {
    for plugin in cpu_plugins() {
        let (out, event, exe) = {
            let client = client(&plugin, 1);
            let exe = client.compile(ADD, &one()).unwrap();
            let x = client.upload_slice(&[1f32; 6], &[2, 3], None).unwrap();
            let y = client.upload_slice(&[2f32; 6], &[2, 3], None).unwrap();
            let out = exe.execute(&[&x, &y]).unwrap();
            let event = out[0].ready().unwrap();
            (out, event, exe)
        };
        event.wait().unwrap();
        assert!(event.is_ready().unwrap());
        drop(exe);
        assert_eq!(out[0].to_vec::<f32>().unwrap(), [3.0; 6]);
        let (sender, receiver) = mpsc::channel();
        event.on_ready(move |outcome| sender.send(outcome.is_ok()).unwrap()).unwrap();
        assert!(receiver.recv_timeout(std::time::Duration::from_secs(20)).unwrap());
        let event = out[0].ready().unwrap();
        event.on_ready(|_| panic!("a callback's panic ends in the callback")).unwrap();
        // Not waited for.
        drop(out[0].to_host_async().unwrap());
    }
}

#[test]
fn threads_share_a_program() {
    on_each(1, |client| {
        let exe = client.compile(ADD, &one()).unwrap();
        std::thread::scope(|scope| {
            for t in 0..4 {
                let exe = &exe;
                scope.spawn(move || {
                    let x = client.upload_slice(&[t as f32; 6], &[2, 3], None).unwrap();
                    for i in 0..50 {
                        let y = client.upload_slice(&[i as f32; 6], &[2, 3], None).unwrap();
                        let out = exe.execute(&[&x, &y]).unwrap();
                        assert_eq!(out[0].to_vec::<f32>().unwrap(), [(t + i) as f32; 6]);
                    }
                });
            }
        });
    });
}
