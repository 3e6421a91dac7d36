//! Custom calls in Rust, from the graph: typed arrays, attributes, errors, panics, and results in place.

use ndarray::array;
use xla::DType;
use xla::graph::ops::custom_call::{Attr, CustomCall};
use xla::graph::{Aval, Graph};
use xla::pjrt::{
    Attributes, CallFrame, Client, Code, CompileOptions, Error, FfiError, Handler, LoadedExecutable, Plugin,
};

use crate::case::Case;
use crate::on_each;

pub(crate) const SCALE: &str = Scale::NAME;
pub(crate) const FIRST_TWO: &str = FirstTwo::NAME;

/// Makes the suite's handlers known to a plugin.
pub(crate) fn register(plugin: &Plugin) {
    plugin.register_handler::<Scale>("Host").unwrap();
    plugin.register_handler::<FirstTwo>("Host").unwrap();
    plugin.register_handler::<Described>("Host").unwrap();
    plugin.register_handler::<Refusing>("Host").unwrap();
    plugin.register_handler::<Counting>("Host").unwrap();
}

/// y = x · by.
struct Scale;

impl Handler for Scale {
    const NAME: &'static str = "conformance.scale";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let by: f32 = frame.attribute("by")?;
        let x = frame.arg::<f32>(0)?;
        frame.result::<f32>(0)?.iter_mut().zip(x).for_each(|(y, x)| *y = x * by);
        Ok(())
    }
}

/// The first two elements in memory.
struct FirstTwo;

impl Handler for FirstTwo {
    const NAME: &'static str = "conformance.first_two";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let x = frame.arg::<f32>(0)?;
        frame.result::<f32>(0)?.copy_from_slice(&x[..2]);
        Ok(())
    }
}

/// Reads every kind of attribute and several element types; the result is the sum of its integers, and what it was
/// told.
struct Described;

impl Handler for Described {
    const NAME: &'static str = "conformance.described";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let wrong = |what: &str| Err(FfiError::invalid(what));
        if frame.attribute::<i64>("i64")? != i64::MIN || frame.attribute::<i32>("i32")? != -3 {
            return wrong("integers");
        }
        if frame.attribute::<f32>("f32")? != 0.1 || frame.attribute::<f64>("f64")? != 1e-300 {
            return wrong("floats");
        }
        if !frame.attribute::<f32>("nan")?.is_nan() || frame.attribute::<f64>("inf")? != f64::NEG_INFINITY {
            return wrong("floats that are not finite");
        }
        if !frame.attribute::<bool>("yes")? || frame.attribute::<bool>("no")? {
            return wrong("bools");
        }
        if frame.attribute::<&str>("text")? != "a \"quoted\" \\ line\nand é" {
            return wrong("strings");
        }
        if frame.attribute::<&[i64]>("i64s")? != [1, -2] || frame.attribute::<&[i32]>("i32s")? != [3] {
            return wrong("integer arrays");
        }
        if frame.attribute::<&[f32]>("f32s")? != [0.5, -1e-20] || frame.attribute::<&[f64]>("f64s")? != [2.5] {
            return wrong("float arrays");
        }
        let more: Attributes = frame.attribute("more")?;
        if more.get::<i64>("inner")? != 7 {
            return wrong("dictionaries");
        }
        let (i8s, i64s, halves) = (frame.arg::<i8>(0)?, frame.arg::<i64>(1)?, frame.arg::<half::bf16>(2)?);
        if frame.arg_array(0)?.dims() != [3] || frame.arg_array(1)?.dims() != [2, 1] || frame.num_args() != 3 {
            return wrong("shapes");
        }
        let sum = i8s.iter().map(|&v| i64::from(v)).sum::<i64>() + i64s.iter().sum::<i64>();
        frame.result::<i64>(0)?[0] = sum;
        frame.result::<half::bf16>(1)?.copy_from_slice(halves);
        Ok(())
    }
}

#[test]
fn typed_arrays_and_attributes() {
    let mut c = Case::new("described");
    let args = [c.arg(&array![-1i8, 100, 3]), c.arg(&array![[1i64 << 40], [5]])];
    let halves = array![1.5f32, -2.0].mapv(half::bf16::from_f32);
    let last = c.arg(&halves);
    let call = CustomCall::new(Described::NAME, vec![Aval::new(DType::I64, &[]), Aval::new(DType::BF16, &[2])])
        .attr("i64", Attr::I64(i64::MIN))
        .attr("i32", Attr::I32(-3))
        .attr("f32", Attr::F32(0.1))
        .attr("f64", Attr::F64(1e-300))
        .attr("nan", Attr::F32(f32::NAN))
        .attr("inf", Attr::F64(f64::NEG_INFINITY))
        .attr("yes", Attr::Bool(true))
        .attr("no", Attr::Bool(false))
        .attr("text", Attr::Str("a \"quoted\" \\ line\nand é".into()))
        .attr("i64s", Attr::I64s(vec![1, -2]))
        .attr("i32s", Attr::I32s(vec![3]))
        .attr("f32s", Attr::F32s(vec![0.5, -1e-20]))
        .attr("f64s", Attr::F64s(vec![2.5]))
        .attr("more", Attr::Dict(vec![("inner".into(), Attr::I64(7))]));
    let results = c.g.apply(call, &[&args[0], &args[1], &last]);
    c.is(&results[0], &ndarray::arr0((1i64 << 40) + 107));
    c.is(&results[1], &halves);
    on_each(|client| c.run(client).unwrap());
}

/// Fails as its attribute says.
struct Refusing;

impl Handler for Refusing {
    const NAME: &'static str = "conformance.refusing";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        match frame.attribute::<&str>("how")? {
            "error" => Err(FfiError::new(Code::OutOfRange, "position 9 of 8")),
            "panic" => panic!("gave up"),
            how => Err(FfiError::invalid(format!("how is {how:?}"))),
        }
    }
}

fn refused(client: &Client, how: &str) -> Error {
    let g = Graph::new("refused");
    let x = g.arg("x", DType::F32, &[2]);
    let results = vec![Aval::new(DType::F32, &[2])];
    let call = CustomCall::new(Refusing::NAME, results).attr("how", Attr::Str(how.into()));
    g.output("y", &g.apply1(call, &[&x]));
    let exe = client.compile(&g.finish().unwrap().stablehlo(), &CompileOptions::default()).unwrap();
    let x = client.upload_slice(&[1f32, 2.0], &[2], None).unwrap();
    exe.execute(&[&x]).and_then(|out| out[0].to_vec::<f32>()).unwrap_err()
}

#[test]
fn errors_and_panics_of_a_handler_are_errors_of_the_execution() {
    on_each(|client| {
        let error = refused(client, "error");
        assert_eq!(error.code(), Some(Code::OutOfRange));
        assert!(error.to_string().contains("position 9 of 8"), "{error}");
        assert!(refused(client, "panic").to_string().contains("gave up"));
        assert!(refused(client, "other").to_string().contains("how is \"other\""));
    });
}

/// Adds 1 in place; the second result is where that was.
struct Counting;

impl Handler for Counting {
    const NAME: &'static str = "conformance.counting";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let address = frame.result_array(0)?.as_ptr() as i64;
        frame.result::<f32>(0)?.iter_mut().for_each(|v| *v += 1.0);
        frame.result::<i64>(1)?[0] = address;
        Ok(())
    }
}

fn counting(client: &Client) -> LoadedExecutable {
    let g = Graph::new("counting");
    let x = g.arg("x", DType::F32, &[65]);
    let results = vec![Aval::new(DType::F32, &[65]), Aval::new(DType::I64, &[])];
    let y = g.apply(CustomCall::new(Counting::NAME, results).alias(0, 0), &[&x]);
    g.output_aliased("x", &y[0], &x);
    g.output("address", &y[1]);
    client.compile(&g.finish().unwrap().stablehlo(), &CompileOptions::default()).unwrap()
}

#[test]
fn a_donated_argument_is_updated_in_place() {
    on_each(|client| {
        let exe = counting(client);
        let mut x = client.upload_slice(&[0f32; 65], &[65], None).unwrap();
        let mut addresses = Vec::new();
        for _ in 0..50 {
            let mut out = exe.execute(&[&x]).unwrap();
            assert!(x.is_deleted().unwrap());
            x = out.remove(0);
            addresses.extend(out[0].to_vec::<i64>().unwrap());
        }
        assert_eq!(x.to_vec::<f32>().unwrap(), [50.0; 65]);
        assert!(addresses.windows(2).all(|pair| pair[0] == pair[1]), "the buffer moved: {addresses:x?}");
    });
}
