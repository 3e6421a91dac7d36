//! What can go wrong between processes. Every sentence says what to do.

use std::time::Duration;

use super::Process;

/// Any failure of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An index or a count without the other.
    #[error("{given} without {missing}: give both to every process, or neither and start them with srun or on a TPU")]
    Half {
        /// The flag that was given.
        given: &'static str,
        /// The flag that it needs.
        missing: &'static str,
    },
    /// An index that does not fit the count.
    #[error(
        "--process-index {index} of --process-count {count}: processes are counted from 0, so the index must be less \
         than the count"
    )]
    Index {
        /// As given.
        index: usize,
        /// As given.
        count: usize,
    },
    /// Two sources that name different places.
    #[error(
        "{} and {}: say which is right with --process-index and --process-count (--process-count 1 for a process on \
         its own)",
        statement(first.0, first.1), statement(second.0, second.1)
    )]
    Contradiction {
        /// What the first source says, and its name.
        first: (Process, &'static str),
        /// What the second says.
        second: (Process, &'static str),
    },
    /// An environment variable that holds no number.
    #[error("{variable} is {found:?}, but must be a whole number; set it, or give --process-index and --process-count")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What it holds.
        found: String,
    },
    /// Several processes with GPUs and no way to find each other.
    #[error(
        "{count} processes with GPUs find each other through an etcd server: start one and give every process \
         --coordinator http://HOST:2379 (or --process-count 1 for a process on its own)"
    )]
    NoCoordinator {
        /// How many processes there are.
        count: usize,
    },
    /// A run without a name.
    #[error(
        "--coordinator without --job-id: give every process the same --job-id, one that no other run on that server \
         has (under srun it is made from the job's number)"
    )]
    NoJobId,
    /// A run with a name that is no part of a key.
    #[error("--job-id {found:?}: must be a name without '/', not empty")]
    JobId {
        /// As given.
        found: String,
    },
    /// A coordinator that is no address.
    #[error("--coordinator {found}: {what}")]
    Coordinator {
        /// As given.
        found: String,
        /// What was required and what to do.
        what: &'static str,
    },
    /// The etcd server does not answer.
    #[error("the etcd server at {address} does not answer ({reason}): start it, or correct --coordinator")]
    Unreachable {
        /// Its address.
        address: String,
        /// What the connection said.
        reason: String,
    },
    /// The etcd server answered something else than what was asked.
    #[error("the server at {address} answered {path} with {answer}: it must be etcd 3.4 or later, and healthy")]
    Answer {
        /// Its address.
        address: String,
        /// What was asked.
        path: &'static str,
        /// Status and text.
        answer: String,
    },
    /// The server has dropped this process's keys.
    #[error(
        "etcd at {address} has dropped this process's keys, because it heard nothing from it for {ttl:?}: restart all \
         processes of the run"
    )]
    LeaseOver {
        /// Its address.
        address: String,
        /// How long it waits.
        ttl: Duration,
    },
    /// Nobody put a key in time.
    #[error(
        "no process of job {job} put the key {key:?} into etcd at {address} within {waited:.1?}: the process that \
         should have has ended or hangs; its own output says why"
    )]
    Timeout {
        /// The key, without the job's prefix.
        key: String,
        /// The store's address.
        address: String,
        /// The run.
        job: String,
        /// How long was waited.
        waited: Duration,
    },
    /// Processes that did not come at the beginning.
    #[error(
        "of the {count} processes of job {job}, {} did not come to etcd at {address} within {waited:.1?}: start them \
         all, with the same --process-count, --job-id and --coordinator",
        list(missing)
    )]
    Missing {
        /// Their indices.
        missing: Vec<usize>,
        /// How many there should be.
        count: usize,
        /// The run.
        job: String,
        /// The store's address.
        address: String,
        /// How long was waited.
        waited: Duration,
    },
    /// Process 0 began no run with this process in it.
    #[error(
        "process 0 of job {job} began no run with this process (index {index}) at etcd {address} within {waited:.1?}: \
         process 0 says which ones it waits for; where a run had begun already, restart all of its processes"
    )]
    NotStarted {
        /// This process's index.
        index: usize,
        /// The run.
        job: String,
        /// The store's address.
        address: String,
        /// How long was waited.
        waited: Duration,
    },
    /// Two processes with one index.
    #[error(
        "two processes of job {job} have the index {index}: give each its own --process-index, and each run its own \
         --job-id"
    )]
    Duplicate {
        /// The index.
        index: usize,
        /// The run.
        job: String,
    },
    /// A process from which no value came.
    #[error("process {process} has not come to {name:?}: {source}")]
    Absent {
        /// Its index.
        process: usize,
        /// What was to be gathered.
        name: String,
        /// What the store says.
        source: xla::pjrt::KeyValueError,
    },
    /// This process could not put its own value.
    #[error(transparent)]
    Store(#[from] xla::pjrt::KeyValueError),
    /// A CPU plugin, which has no devices but its own.
    #[error(
        "device cpu with {count} processes: the CPU plugin runs in one process, with as many devices as --mesh asks \
         for; leave out --process-count, or set it to 1 under srun"
    )]
    OneProcess {
        /// How many processes were asked for.
        count: usize,
    },
    /// The client sees another arrangement than this process was told.
    #[error("this is process {told} by its flags or environment, but {seen} by its devices: correct the flags")]
    Placement {
        /// By flags or environment.
        told: Process,
        /// By the client.
        seen: Process,
    },
    /// The plugin refused something.
    #[error(transparent)]
    Pjrt(#[from] xla::pjrt::Error),
}

impl Error {
    /// Whether the command line or the environment is wrong, not the world.
    pub fn is_usage(&self) -> bool {
        use Error::{Contradiction, Coordinator, Half, Index, JobId, NoCoordinator, NoJobId, OneProcess, Variable};
        matches!(
            self,
            Half { .. }
                | Index { .. }
                | Contradiction { .. }
                | Variable { .. }
                | NoCoordinator { .. }
                | NoJobId
                | JobId { .. }
                | Coordinator { .. }
                | OneProcess { .. }
        )
    }
}

fn statement(process: Process, said_by: &str) -> String {
    format!("this is process {process} by {said_by}")
}

/// `1, 3 and 5`, at most eight of them.
fn list(indices: &[usize]) -> String {
    const SHOWN: usize = 8;
    let mut names: Vec<String> = indices.iter().take(SHOWN).map(ToString::to_string).collect();
    if indices.len() > SHOWN {
        names.push(format!("{} more", indices.len() - SHOWN));
    }
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "none".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::list;

    #[test]
    fn missing_processes_are_listed_as_in_a_sentence() {
        assert_eq!(list(&[3]), "3");
        assert_eq!(list(&[1, 3]), "1 and 3");
        assert_eq!(list(&[1, 3, 5]), "1, 3 and 5");
        assert_eq!(list(&(0..12).collect::<Vec<_>>()), "0, 1, 2, 3, 4, 5, 6, 7 and 4 more");
    }
}
