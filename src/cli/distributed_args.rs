//! Options that say which process of how many this is, and where they meet.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use xla::pjrt::KeyValueStore;
use xllama::Error;
use xllama::distributed::{EtcdStore, JoinOptions, Process, job_id};

/// `--process-index`, `--process-count`, `--coordinator`, `--job-id` and `--join-timeout`.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Several hosts")]
pub struct DistributedArgs {
    /// Which process this is, from 0 [default: from srun, a TPU's environment or an Indexed Job].
    #[arg(long, value_name = "I", env = "XLLAMA_PROCESS_INDEX")]
    pub process_index: Option<usize>,
    /// How many processes run this command together; 1 is a process on its own [default: from srun or a TPU].
    #[arg(long, value_name = "N", env = "XLLAMA_PROCESS_COUNT")]
    pub process_count: Option<usize>,
    /// The etcd server where processes with GPUs find each other, as http://HOST:2379.
    #[arg(long, value_name = "URL", env = "XLLAMA_COORDINATOR")]
    pub coordinator: Option<String>,
    /// A name that these processes share and no other run on that server has [default: the Slurm step].
    #[arg(long, value_name = "NAME", env = "XLLAMA_JOB_ID")]
    pub job_id: Option<String>,
    /// How many seconds to wait for the other processes.
    #[arg(long, value_name = "S", default_value_t = 300)]
    pub join_timeout: u32,
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl DistributedArgs {
    /// This process's place, as far as it is known before there is a client.
    pub fn process(&self) -> Result<Process, Error> {
        Ok(Process::resolve(self.process_index, self.process_count, &env)?)
    }

    /// Joins the other processes at the coordinator; none where this process is alone, or where no coordinator is
    /// given (a TPU needs none).
    pub fn store(&self, process: Process) -> Result<Option<Arc<dyn KeyValueStore>>, Error> {
        let Some(address) = self.coordinator.clone().filter(|_| process != Process::SINGLE) else { return Ok(None) };
        let job = job_id(self.job_id.as_deref(), &env)?;
        let timeout = Duration::from_secs(self.join_timeout.into());
        Ok(Some(Arc::new(EtcdStore::join(&JoinOptions { address, job, timeout }, process)?)))
    }
}

/// Sends what this process prints from here on nowhere: of several processes, the first speaks for all.
pub fn be_silent() -> Result<(), Error> {
    let nowhere =
        File::options().write(true).open("/dev/null").map_err(Error::io("opening", Path::new("/dev/null")))?;
    rustix::stdio::dup2_stdout(nowhere).map_err(|e| Error::io("redirecting", Path::new("standard output"))(e.into()))
}
