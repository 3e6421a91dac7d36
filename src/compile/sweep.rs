//! Trying meshes and batch sizes: which fit, and which is fastest for what one pays.

use serde_json::{Value, json};

use super::job::{Job, meshes};
use super::report::{self, Memory, Report};
use super::target::Machine;
use crate::Error;
use crate::sharding::MeshShape;

/// One combination.
#[derive(Clone, Debug)]
pub struct Row {
    /// How the model is split.
    pub mesh: MeshShape,
    /// Slots over all devices.
    pub batch: usize,
    /// Memory of one device.
    pub memory: Memory,
    /// What the compiler says; `None` where the arguments alone do not fit.
    pub report: Option<Report>,
    /// Why there is no report, where building or compiling failed.
    pub problem: Option<String>,
    /// The fastest for a chip.
    pub best: bool,
}

/// Compiles `job` with every mesh that divides the model over the machine's devices and every batch size that it divides in
/// turn. What cannot fit by arithmetic is not compiled. `progress` gets the combination at hand, its number from 0 and
/// their count, and says whether to go on.
///
/// # Errors
/// [`Error::Interrupted`] where `progress` says so; what building or compiling says, if it says so of every combination; and
/// [`Error::Option`] if there is no combination.
pub fn sweep(
    job: &Job<'_>,
    machine: &Machine,
    batches: &[usize],
    progress: &mut dyn FnMut(&Job<'_>, usize, usize) -> bool,
) -> Result<Vec<Row>, Error> {
    let all = combinations(machine.devices, job, batches);
    let mut rows = Vec::with_capacity(all.len());
    let mut first_error = None;
    for (i, (mesh, batch)) in all.iter().copied().enumerate() {
        let job = Job { mesh, batch, ..*job };
        if !progress(&job, i, all.len()) {
            return Err(Error::Interrupted);
        }
        let (memory, report, problem) = match one(&job, machine) {
            Ok((memory, report)) => (memory, report, None),
            Err(e) => {
                let problem = e.to_string();
                first_error.get_or_insert(e);
                (Memory { limit: machine.limit, ..Memory::default() }, None, Some(problem))
            }
        };
        rows.push(Row { mesh, batch, memory, report, problem, best: false });
    }
    if rows.iter().all(|row| row.problem.is_some()) {
        let what = format!("{batches:?}: no mesh of {} devices splits any of them evenly", machine.devices);
        return Err(first_error.unwrap_or(Error::Option { name: "sweep-batch".into(), what }));
    }
    mark(&mut rows);
    Ok(rows)
}

/// One combination: compiled unless its arguments alone do not fit.
fn one(job: &Job<'_>, machine: &Machine) -> Result<(Memory, Option<Report>), Error> {
    let arguments = job.prepare()?.sizes.arguments;
    let known = Memory { arguments, total: arguments, limit: machine.limit, ..Memory::default() };
    if known.fits() == Some(false) {
        return Ok((known, None));
    }
    let (report, ..) = report::compile(job, machine)?;
    Ok((report.memory, Some(report)))
}

/// Meshes times batch sizes, where no device would only do what another does: data and fsdp divide the batch.
fn combinations(devices: usize, job: &Job<'_>, batches: &[usize]) -> Vec<(MeshShape, usize)> {
    let meshes = meshes(devices, job.cfg);
    let pairs = meshes.iter().flat_map(|mesh| batches.iter().map(|batch| (*mesh, *batch)));
    pairs.filter(|(mesh, batch)| batch.is_multiple_of(mesh.data * mesh.fsdp)).collect()
}

/// Marks the row with the most tokens per second, of those that fit.
fn mark(rows: &mut [Row]) {
    let rate = |row: &Row| row.report.as_ref().and_then(Report::predicted);
    let top = rows.iter().filter_map(rate).max_by(f64::total_cmp);
    if let Some(row) = rows.iter_mut().find(|row| top.is_some() && rate(row) == top) {
        row.best = true;
    }
}

impl Row {
    /// Whether it fits, where that is known.
    pub fn fits(&self) -> Option<bool> {
        self.memory.fits().filter(|_| self.problem.is_none())
    }

    /// Tokens per second over all devices, if it fits and that is known.
    pub fn rate(&self) -> Option<f64> {
        self.report.as_ref().and_then(Report::predicted)
    }

    /// The row as `xllama compile --sweep --json` prints it.
    pub fn json(&self, chips: usize) -> Value {
        json!({
            "mesh": self.mesh.to_string(),
            "batch": self.batch,
            "compiled": self.report.as_ref().is_some_and(|r| r.figures.is_some()),
            "fits": self.fits(),
            "arguments": self.memory.arguments,
            "temporaries": self.memory.temporaries,
            "total": self.memory.total,
            "limit": self.memory.limit,
            "compile_s": self.report.as_ref().map(|r| r.compile_s),
            "cycles": self.report.as_ref().and_then(|r| r.figures.as_ref()?.cycles).map(|c| c.total),
            "tok_s": self.rate(),
            "tok_s_per_chip": self.rate().map(|rate| rate / chips as f64),
            "problem": self.problem,
            "best": self.best,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::chips::Floors;
    use crate::compile::job::{Sizes, Step};
    use crate::compile::presets;
    use crate::kv_cache::CacheShape;
    use crate::params::Llama;
    use crate::runtime::CacheOptions;
    use xla::DType;
    use xla::graph::{Emission, Platform};

    #[test]
    fn a_batch_is_split_by_data_and_fsdp_or_the_mesh_is_left_out() {
        let cfg = presets::find("llama-2-7b").expect("a preset").config().expect("valid");
        let params = Llama::declare(&cfg);
        let job = Job {
            model: "m",
            cfg: &cfg,
            params: &params,
            precision: DType::BF16.into(),
            step: Step::Decode,
            batch: 1,
            len: 256,
            cache: CacheOptions::default(),
            mesh: MeshShape::default(),
            partitioner: Emission::Shardy,
            platform: Platform::Tpu,
            kernels: &[],
        };
        let names = |batches: &[usize]| -> Vec<String> {
            combinations(4, &job, batches).iter().map(|(mesh, batch)| format!("{mesh} × {batch}")).collect()
        };
        assert_eq!(names(&[1]), ["model=4 × 1"]);
        let two = ["model=4 × 1", "model=4 × 2", "fsdp=2,model=2 × 2", "data=2,model=2 × 2"];
        assert_eq!(names(&[1, 2]), two);
        assert_eq!(names(&[4]).len(), 6);
    }

    #[test]
    fn the_fastest_that_fits_is_marked() {
        let row = |limit: u64, hbm: f64| {
            let memory = Memory { total: 10, limit: Some(limit), ..Memory::default() };
            let figures = report::Figures {
                flops: None,
                bytes_accessed: None,
                cycles: None,
                collectives: Vec::new(),
                copies: Vec::new(),
                costs: Vec::new(),
                loops: 0,
                unestimated: Default::default(),
            };
            let report = Report {
                compile_s: 1.0,
                cache: CacheShape { batch: 8, len: 256, dtype: DType::BF16, pages: None, platform: Platform::Tpu },
                memory,
                sizes: Sizes::default(),
                figures: Some(figures),
                shortage: None,
                floors: Some(Floors { hbm, flops: 0.0, links: 0.0, cycles: None }),
                tokens: 8,
                chips: 4,
            };
            Row { mesh: MeshShape::default(), batch: 8, memory, report: Some(report), problem: None, best: false }
        };
        let mut rows = vec![row(100, 2.0), row(100, 0.5), row(1, 0.1), Row { report: None, ..row(1, 0.1) }];
        mark(&mut rows);
        assert_eq!(rows.iter().map(|row| row.best).collect::<Vec<_>>(), [false, true, false, false]);
        assert_eq!(rows.iter().map(Row::rate).collect::<Vec<_>>(), [Some(4.0), Some(16.0), None, None]);
        assert_eq!(rows[1].json(4)["tok_s_per_chip"], 4.0);
        mark(&mut []);
    }
}
