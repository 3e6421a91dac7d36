//! Where the time of a decoded token goes.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use xllama::runtime::KernelCall;

use super::table;

/// Time of one decoded token, the median token where it says so.
pub struct Profile {
    /// Threads that kernels have.
    threads: usize,
    /// Calls and time of each kernel, the dearest first.
    kernels: Vec<(&'static str, usize, Duration)>,
    /// From the first kernel of a token to its last, less the kernels: XLA's own operations, and handing over.
    rest: Duration,
    /// From the last kernel of a token to the first of the next, the median: sampling, the end and the beginning of an
    /// execution, and whatever the host does meanwhile.
    between: Duration,
}

impl Profile {
    /// Of the calls of kernels while `tokens` tokens were decoded.
    pub fn of(calls: &[KernelCall], tokens: usize) -> Profile {
        let mut sums: BTreeMap<&str, (usize, Duration)> = BTreeMap::new();
        for call in calls {
            let sum = sums.entry(call.name).or_default();
            *sum = (sum.0 + 1, sum.1 + (call.end - call.start));
        }
        let n = tokens as u32;
        let mut kernels: Vec<_> =
            sums.into_iter().map(|(name, (calls, time))| (name, calls / tokens, time / n)).collect();
        kernels.sort_by_key(|(_, _, time)| std::cmp::Reverse(*time));
        let steps: Vec<&[KernelCall]> = calls.chunks((calls.len() / tokens).max(1)).collect();
        let mut gaps: Vec<Duration> = steps
            .windows(2)
            .filter_map(|pair| Some(pair[1].first()?.start.saturating_duration_since(pair[0].last()?.end)))
            .collect();
        gaps.sort_unstable();
        let inside: Duration = steps.iter().filter_map(|step| Some(step.last()?.end - step.first()?.start)).sum();
        let in_kernels: Duration = kernels.iter().map(|(_, _, time)| *time).sum();
        let between = gaps.get(gaps.len() / 2).copied().unwrap_or_default();
        let threads = calls.iter().map(|call| call.threads).max().unwrap_or(0);
        Profile { threads, kernels, rest: (inside / n).saturating_sub(in_kernels), between }
    }

    /// Microseconds.
    pub fn json(&self) -> Value {
        let kernels = self
            .kernels
            .iter()
            .map(|(name, calls, time)| (name.to_string(), json!({ "calls": calls, "us": micros(*time) })));
        json!({
            "threads": self.threads,
            "kernels": kernels.collect::<serde_json::Map<_, _>>(),
            "xla_us": micros(self.rest),
            "between_tokens_us": micros(self.between),
        })
    }

    /// A table for people.
    pub fn print(&self) {
        let us = |time: Duration| format!("{:.1}", micros(time));
        let mut rows: Vec<Vec<String>> = self
            .kernels
            .iter()
            .map(|(name, calls, time)| vec![name.to_string(), calls.to_string(), us(*time)])
            .collect();
        rows.push(vec!["XLA's own, between kernels".into(), String::new(), us(self.rest)]);
        rows.push(vec!["between two tokens".into(), String::new(), us(self.between)]);
        println!("\nkernels on {} threads", self.threads);
        table::print(&["a decoded token", "calls", "µs"], &rows, &[1, 2]);
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
