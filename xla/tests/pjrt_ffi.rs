//! Pins custom calls in Rust on every CPU plugin: typed arrays, attributes, aliasing, threads, errors and panics.

mod pjrt_support;

use pjrt_support::cpu_plugins;
use std::sync::atomic::{AtomicUsize, Ordering};
use xla::pjrt::{Attributes, CallFrame, Client, Code, CompileOptions, FfiError, Handler, Plugin, Value};

fn client_with<H: Handler>(plugin: &Plugin) -> Client {
    plugin.register_handler::<H>("Host").unwrap();
    plugin.client(&[("cpu_device_count", Value::from(1i64))]).unwrap()
}

/// y = x · scale + sum(offsets), in chunks on XLA's threads; the second result is the number of elements.
struct Affine;

impl Handler for Affine {
    const NAME: &'static str = "test.affine";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        if frame.num_args() != 1 || frame.num_results() != 2 {
            return Err(FfiError::invalid("expected 1 argument and 2 results"));
        }
        let scale: f32 = frame.attribute("scale")?;
        let offsets: &[i64] = frame.attribute("offsets")?;
        let nested: Attributes = frame.attribute("more")?;
        assert_eq!(nested.get::<&str>("text")?, "some text");
        assert!(nested.get::<bool>("flag")?);
        assert_eq!(frame.attribute::<i32>("count")?, -3);
        assert_eq!(frame.attribute::<f64>("wide")?, 0.25);
        assert_eq!(frame.attribute::<&[f32]>("floats")?, [1.5, 2.5]);
        assert_eq!(frame.attributes().names(), ["count", "floats", "more", "offsets", "scale", "wide"]);
        let x = frame.arg::<f32>(0)?;
        assert_eq!(frame.arg_array(0)?.dims(), [40, 25]);
        let y = frame.result::<f32>(0)?;
        frame.result::<i32>(1)?[0] = x.len() as i32;
        assert!(frame.result::<f32>(0).is_err(), "a result is taken once");
        let offset = offsets.iter().sum::<i64>() as f32;
        let pool = frame.thread_pool();
        assert!(pool.num_threads()? >= 1);
        let chunks: Vec<_> = y.chunks_mut(7).map(std::sync::Mutex::new).collect();
        pool.for_each(chunks.len(), &|i| {
            let mut out = chunks[i].lock().unwrap();
            for (y, x) in out.iter_mut().zip(&x[i * 7..]) {
                *y = x * scale + offset;
            }
        })
    }
}

const AFFINE: &str = r#"func.func @main(%x: tensor<40x25xf32>) -> (tensor<40x25xf32>, tensor<i32>) {
  %y:2 = stablehlo.custom_call @test.affine(%x) {api_version = 4 : i32, backend_config = {
    scale = 2.0 : f32, offsets = array<i64: 3, 4>, count = -3 : i32, wide = 0.25 : f64,
    floats = array<f32: 1.5, 2.5>, more = {text = "some text", flag = true}}}
    : (tensor<40x25xf32>) -> (tensor<40x25xf32>, tensor<i32>)
  return %y#0, %y#1 : tensor<40x25xf32>, tensor<i32>
}"#;

#[test]
fn arrays_attributes_and_threads() {
    for plugin in cpu_plugins() {
        let client = client_with::<Affine>(&plugin);
        plugin.register_handler::<Affine>("Host").unwrap();
        let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let expected: Vec<f32> = x.iter().map(|x| x * 2.0 + 7.0).collect();
        let x = client.upload_slice(&x, &[40, 25], None).unwrap();
        let exe = client.compile(AFFINE, &CompileOptions::default()).unwrap();
        // Handlers are found again by a program that was serialized.
        let loaded = client.deserialize(&exe.serialize().unwrap()).unwrap();
        for exe in [exe, loaded] {
            for _ in 0..20 {
                let out = exe.execute(&[&x]).unwrap();
                assert_eq!(out[0].to_vec::<f32>().unwrap(), expected);
                assert_eq!(out[1].to_vec::<i32>().unwrap(), [1000]);
            }
        }
    }
}

/// Adds 1 to the argument in its own memory.
struct InPlace;

impl Handler for InPlace {
    const NAME: &'static str = "test.in_place";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let refused = frame.arg::<f32>(0).unwrap_err().message;
        assert!(refused.contains("shares its memory with result 0"), "{refused}");
        let by = frame.arg::<f32>(1)?[0];
        frame.result::<f32>(0)?.iter_mut().for_each(|v| *v += by);
        Ok(())
    }
}

#[test]
fn a_result_in_its_arguments_memory() {
    const TEXT: &str = "func.func @main(%x: tensor<64xf32> {tf.aliasing_output = 0 : i32}, %by: tensor<f32>) -> tensor<64xf32> {
      %y = stablehlo.custom_call @test.in_place(%x, %by) {api_version = 4 : i32, backend_config = {},
        output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []>]}
        : (tensor<64xf32>, tensor<f32>) -> tensor<64xf32>
      return %y : tensor<64xf32>
    }";
    for plugin in cpu_plugins() {
        let client = client_with::<InPlace>(&plugin);
        let exe = client.compile(TEXT, &CompileOptions::default()).unwrap();
        let by = client.upload_slice(&[0.5f32], &[], None).unwrap();
        let mut x = client.upload_slice(&[1f32; 64], &[64], None).unwrap();
        for _ in 0..10 {
            x = exe.execute(&[&x, &by]).unwrap().remove(0);
        }
        assert_eq!(x.to_vec::<f32>().unwrap(), [6.0; 64]);
    }
}

/// Fails in the way its argument says.
struct Failing;

impl Handler for Failing {
    const NAME: &'static str = "test.failing";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let how = frame.arg::<i32>(0)?[0];
        match how {
            0 => Err(FfiError::new(Code::OutOfRange, "the handler says no")),
            1 => panic!("the handler gave up at {how}"),
            2 => frame.thread_pool().for_each(10, &|i| assert!(i != 5, "chunk {i}")),
            3 => frame.arg::<f32>(0).map(|_| ()),
            4 => frame.arg::<i32>(9).map(|_| ()),
            5 => frame.attribute::<i64>("axis").map(|_| ()),
            6 => frame.attribute::<i64>("name").map(|_| ()),
            _ => {
                frame.result::<i32>(0)?[0] = how;
                Ok(())
            }
        }
    }
}

#[test]
fn errors_and_panics_fail_the_execution_and_nothing_else() {
    let text = |dot: &str| {
        format!(
            r#"func.func @main(%x: tensor<i32>, %m: tensor<64x64xf32>) -> (tensor<i32>, tensor<64x64xf32>) {{
          %y = stablehlo.custom_call @test.failing(%x) {{api_version = 4 : i32, backend_config = {{name = "n"}}}}
            : (tensor<i32>) -> tensor<i32>
          {dot}
          return %y, %d : tensor<i32>, tensor<64x64xf32>
        }}"#
        )
    };
    // With a dot the CPU plugins run the program asynchronously: the error then comes from the outputs.
    let dot = "%d = stablehlo.dot_general %m, %m, contracting_dims = [1] x [0]
        : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>";
    let none = "%d = stablehlo.negate %m : tensor<64x64xf32>";
    for plugin in cpu_plugins() {
        let client = client_with::<Failing>(&plugin);
        let m = client.upload_slice(&[1f32; 4096], &[64, 64], None).unwrap();
        for text in [text(dot), text(none)] {
            let exe = client.compile(&text, &CompileOptions::default()).unwrap();
            let run = |how: i32| {
                let x = client.upload_slice(&[how], &[], None).unwrap();
                let out = exe.execute(&[&x, &m])?;
                out[0].ready()?.wait()?;
                out[0].to_vec::<i32>()
            };
            for (how, message) in [
                (0, "test.failing: the handler says no"),
                (1, "test.failing panicked: the handler gave up at 1"),
                (2, "a chunk panicked: chunk 5"),
                (3, "argument 0 is i32[], expected [F32]"),
                (4, "expected argument 9, the call has 1"),
                (5, "expected an attribute axis (i64), found [\"name\"]"),
                (6, "attribute name is not of the type i64"),
            ] {
                let error = run(how).unwrap_err();
                assert!(error.to_string().contains(message), "{error}");
            }
            assert_eq!(run(0).unwrap_err().code(), Some(Code::OutOfRange));
            assert_eq!(run(7).unwrap(), [7]);
        }
    }
}

struct Impostor;

impl Handler for Impostor {
    const NAME: &'static str = Affine::NAME;

    fn call(_: &mut CallFrame<'_>) -> Result<(), FfiError> {
        Ok(())
    }
}

#[test]
fn one_name_is_one_handler_and_unknown_names_do_not_compile() {
    for plugin in cpu_plugins() {
        plugin.register_handler::<Affine>("Host").unwrap();
        let error = plugin.register_handler::<Impostor>("Host").unwrap_err().to_string();
        assert!(error.contains("another handler is registered as test.affine"), "{error}");
        let client = plugin.client(&[]).unwrap();
        let text = AFFINE.replace("test.affine", "test.nobody");
        let error = client.compile(&text, &CompileOptions::default()).unwrap_err().to_string();
        assert!(error.contains("test.nobody"), "{error}");
    }
}

/// Counts the tasks that ran, without waiting for any.
struct Scheduling;

static RAN: AtomicUsize = AtomicUsize::new(0);

impl Handler for Scheduling {
    const NAME: &'static str = "test.scheduling";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let pool = frame.thread_pool();
        for i in 0..8 {
            pool.schedule(move || {
                RAN.fetch_add(1, Ordering::SeqCst);
                assert!(i != 3, "a task's panic ends in the task");
            })?;
        }
        frame.result::<u8>(0)?.fill(1);
        Ok(())
    }
}

#[test]
fn scheduled_tasks_run() {
    const TEXT: &str = "func.func @main() -> tensor<3xi1> {
      %y = stablehlo.custom_call @test.scheduling() {api_version = 4 : i32, backend_config = {}} : () -> tensor<3xi1>
      return %y : tensor<3xi1>
    }";
    for plugin in cpu_plugins() {
        let client = client_with::<Scheduling>(&plugin);
        let exe = client.compile(TEXT, &CompileOptions::default()).unwrap();
        let before = RAN.load(Ordering::SeqCst);
        assert_eq!(exe.execute(&[]).unwrap()[0].to_vec::<bool>().unwrap(), [true; 3]);
        let start = std::time::Instant::now();
        while RAN.load(Ordering::SeqCst) < before + 8 {
            assert!(start.elapsed().as_secs() < 20);
            std::thread::yield_now();
        }
    }
}
