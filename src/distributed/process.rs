//! Which process this is, and of how many.

use std::fmt;

use xla::pjrt::Client;

use super::environment::{self, Environment};
use super::error::Error;

/// A process's place among those that run one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    index: usize,
    count: usize,
}

impl Process {
    /// The only one.
    pub const SINGLE: Process = Process { index: 0, count: 1 };

    /// Process `index` (from 0) of `count`.
    ///
    /// # Errors
    /// [`Error::Index`].
    pub fn new(index: usize, count: usize) -> Result<Process, Error> {
        match index < count {
            true => Ok(Process { index, count }),
            false => Err(Error::Index { index, count }),
        }
    }

    /// This process's place from its flags (or the variables that stand for them), else from what started it.
    ///
    /// | source | index | count |
    /// |---|---|---|
    /// | flags | `--process-index` | `--process-count`; 1 needs no index |
    /// | TPU on GKE, or by hand | `TPU_WORKER_ID` | names in `TPU_WORKER_HOSTNAMES` |
    /// | Slurm, under `srun` | `SLURM_PROCID` | `SLURM_STEP_NUM_TASKS` |
    /// | Kubernetes, an Indexed Job | `JOB_COMPLETION_INDEX` | only from the flag |
    ///
    /// Where nothing says anything it is [`Process::SINGLE`]. A TPU VM says nothing in its environment: there the
    /// client knows ([`Process::of_client`]).
    ///
    /// # Errors
    /// Half of an answer, two that differ, or an index that is not less than the count.
    pub fn resolve(index: Option<usize>, count: Option<usize>, env: Environment<'_>) -> Result<Process, Error> {
        const INDEX: &str = "--process-index";
        const COUNT: &str = "--process-count";
        match (index, count) {
            (Some(index), Some(count)) => Process::new(index, count),
            (None, Some(1)) => Ok(Process::SINGLE),
            (None, None) => Ok(environment::stated(env)?.map_or(Process::SINGLE, |(process, _)| process)),
            (Some(index), None) => match environment::stated(env)? {
                Some((stated, _)) if stated.index == index => Ok(stated),
                Some((stated, by)) => {
                    let flag = Process::new(index, stated.count)?;
                    Err(Error::Contradiction { first: (flag, INDEX), second: (stated, by) })
                }
                None => Err(Error::Half { given: INDEX, missing: COUNT }),
            },
            (None, Some(count)) => match (environment::stated(env)?, environment::kubernetes_index(env)?) {
                (Some((stated, _)), _) if stated.count == count => Ok(stated),
                (Some((stated, by)), _) => {
                    let flag = Process::new(stated.index, count)?;
                    Err(Error::Contradiction { first: (flag, COUNT), second: (stated, by) })
                }
                (None, Some(index)) => Process::new(index, count),
                (None, None) => Err(Error::Half { given: COUNT, missing: INDEX }),
            },
        }
    }

    /// This process's place as its devices show it. On a TPU pod only libtpu knows it beforehand.
    pub fn of_client(client: &Client) -> Process {
        let last = client.devices().iter().map(|d| d.description().process_index).max().unwrap_or(0);
        let index = usize::try_from(client.process_index()).unwrap_or(0);
        Process { index, count: index.max(usize::try_from(last).unwrap_or(0)) + 1 }
    }

    /// From 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// How many there are.
    pub fn count(self) -> usize {
        self.count
    }

    /// Whether this is process 0, the one that prints.
    pub fn is_leader(self) -> bool {
        self.index == 0
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process with these flags and variables is, in words.
    fn resolve(index: Option<usize>, count: Option<usize>, env: &[(&str, &str)]) -> String {
        let env = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Process::resolve(index, count, &env).map_or_else(|e| e.to_string(), |p| p.to_string())
    }

    const SLURM: [(&str, &str); 2] = [("SLURM_PROCID", "2"), ("SLURM_STEP_NUM_TASKS", "4")];
    const TPU: [(&str, &str); 2] = [("TPU_WORKER_ID", "1"), ("TPU_WORKER_HOSTNAMES", "a,b,c,d")];
    const INDEXED: [(&str, &str); 1] = [("JOB_COMPLETION_INDEX", "3")];

    #[test]
    fn each_source_is_read() {
        assert_eq!(resolve(None, None, &[]), "0 of 1");
        assert_eq!(resolve(Some(1), Some(2), &[]), "1 of 2");
        assert_eq!(resolve(None, None, &SLURM), "2 of 4");
        assert_eq!(resolve(None, None, &TPU), "1 of 4");
        assert_eq!(resolve(None, Some(4), &INDEXED), "3 of 4");
        // Inside a batch script, before srun: one process, whatever the number of tasks.
        assert_eq!(resolve(None, None, &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), "0 of 1");
        // What keeps libtpu from looking for TPUs.
        assert_eq!(resolve(None, None, &[("TPU_WORKER_ID", "0"), ("TPU_WORKER_HOSTNAMES", "localhost")]), "0 of 1");
        // An Indexed Job of single processes.
        assert_eq!(resolve(None, None, &INDEXED), "0 of 1");
    }

    #[test]
    fn flags_go_before_the_environment() {
        assert_eq!(resolve(Some(0), Some(8), &SLURM), "0 of 8");
        assert_eq!(resolve(None, Some(1), &SLURM), "0 of 1");
        assert_eq!(resolve(None, Some(4), &SLURM), "2 of 4");
        assert_eq!(resolve(Some(2), None, &SLURM), "2 of 4");
    }

    #[test]
    fn sources_that_agree_are_one() {
        let both = [SLURM.as_slice(), &[("TPU_WORKER_ID", "2"), ("TPU_WORKER_HOSTNAMES", "a,b,c,d")]].concat();
        assert_eq!(resolve(None, None, &both), "2 of 4");
        // One worker is what every process is that nobody said anything about.
        let alone = [SLURM.as_slice(), &[("TPU_WORKER_ID", "0"), ("TPU_WORKER_HOSTNAMES", "localhost")]].concat();
        assert_eq!(resolve(None, None, &alone), "2 of 4");
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_says_what_to_do() {
        let both = [SLURM.as_slice(), &TPU].concat();
        for (index, count, env, found, advice) in [
            (Some(1), None, &[][..], "--process-index without --process-count", "give both"),
            (None, Some(2), &[], "--process-count without --process-index", "give both"),
            (Some(2), Some(2), &[], "--process-index 2 of --process-count 2", "less than the count"),
            (Some(0), Some(0), &[], "--process-index 0 of --process-count 0", "less than the count"),
            (None, Some(2), &INDEXED, "--process-index 3 of --process-count 2", "less than the count"),
            (None, Some(8), &SLURM, "2 of 8 by --process-count and this is process 2 of 4 by Slurm", "say which"),
            (Some(3), None, &SLURM, "3 of 4 by --process-index and this is process 2 of 4 by Slurm", "say which"),
            (None, None, &both, "1 of 4 by TPU_WORKER_ID and TPU_WORKER_HOSTNAMES and this is", "say which"),
            (None, None, &[("TPU_WORKER_HOSTNAMES", "a,b")], "TPU_WORKER_ID is \"\"", "set it"),
            (None, Some(3), &[("JOB_COMPLETION_INDEX", "x")], "JOB_COMPLETION_INDEX is \"x\"", "whole number"),
        ] {
            let error = resolve(index, count, env);
            assert!(error.contains(found) && error.contains(advice), "{found:?}, {advice:?}: {error}");
        }
    }
}
