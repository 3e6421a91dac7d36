//! What the tests of this module share.

use super::{Graph, Tensor};

/// The lines of the entry function between its head and its return, without indentation and locations.
pub(crate) fn lines(build: impl FnOnce(&Graph) -> Vec<Tensor>) -> Vec<String> {
    let g = Graph::new("test");
    for (i, output) in build(&g).iter().enumerate() {
        g.output(&i.to_string(), output);
    }
    let text = g.finish().expect("the graph is right").stablehlo();
    let lines = text.lines().map(str::trim).skip_while(|line| !line.starts_with("func.func public")).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("return"));
    lines.map(|line| line.split(" loc(").next().unwrap_or(line).to_string()).collect()
}

/// The last of [`lines`].
pub(crate) fn last_line(build: impl FnOnce(&Graph) -> Vec<Tensor>) -> String {
    lines(build).pop().unwrap_or_default()
}

/// The message of the error that the graph ends in.
pub(crate) fn error(build: impl FnOnce(&Graph) -> Vec<Tensor>) -> String {
    let g = Graph::new("test");
    for (i, output) in build(&g).iter().enumerate() {
        g.output(&i.to_string(), output);
    }
    g.finish().expect_err("the graph is wrong").message
}
