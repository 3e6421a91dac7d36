//! What those who start processes say to each through its environment.

use super::error::Error;
use super::process::Process;

/// Looks up an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A place and the name of who says so.
type Statement = (Process, &'static str);

/// What the environment says of this process; nothing where it is alone.
pub(super) fn stated(env: Environment<'_>) -> Result<Option<Statement>, Error> {
    let several = |s: &Statement| s.0.count() > 1;
    match (tpu(env)?.filter(several), slurm(env)?.filter(several)) {
        (Some(first), Some(second)) if first.0 != second.0 => Err(Error::Contradiction { first, second }),
        (first, second) => Ok(first.or(second)),
    }
}

/// The workers of a TPU slice, as GKE lists them.
fn tpu(env: Environment<'_>) -> Result<Option<Statement>, Error> {
    let Some(hosts) = env("TPU_WORKER_HOSTNAMES").filter(|h| !h.is_empty()) else { return Ok(None) };
    let index = number(env, "TPU_WORKER_ID")?;
    Ok(Some((Process::new(index, hosts.split(',').count())?, "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES")))
}

/// The tasks of a Slurm step. Outside of one, in a batch script, `SLURM_NTASKS` and a `SLURM_PROCID` of 0 are set as
/// well, but there the process is alone; only `srun` sets the number of the step's tasks.
fn slurm(env: Environment<'_>) -> Result<Option<Statement>, Error> {
    if env("SLURM_STEP_NUM_TASKS").is_none() {
        return Ok(None);
    }
    let process = Process::new(number(env, "SLURM_PROCID")?, number(env, "SLURM_STEP_NUM_TASKS")?)?;
    Ok(Some((process, "Slurm (SLURM_PROCID and SLURM_STEP_NUM_TASKS)")))
}

/// The index of a pod in an Indexed Job. Kubernetes does not say of how many.
pub(super) fn kubernetes_index(env: Environment<'_>) -> Result<Option<usize>, Error> {
    match env("JOB_COMPLETION_INDEX") {
        Some(_) => number(env, "JOB_COMPLETION_INDEX").map(Some),
        None => Ok(None),
    }
}

fn number(env: Environment<'_>, variable: &'static str) -> Result<usize, Error> {
    let found = env(variable).unwrap_or_default();
    found.trim().parse().map_err(|_| Error::Variable { variable, found })
}

/// The name of a run: what was given, else the Slurm step, which has a new name when the job is requeued.
///
/// # Errors
/// [`Error::NoJobId`] where there is none, [`Error::JobId`] where it is no name.
pub fn job_id(given: Option<&str>, env: Environment<'_>) -> Result<String, Error> {
    let part = |name| env(name).filter(|v| !v.is_empty());
    let slurm = || {
        let (job, step) = (part("SLURM_JOB_ID")?, part("SLURM_STEP_ID")?);
        Some(format!("slurm-{job}.{step}.{}", part("SLURM_RESTART_COUNT").unwrap_or("0".into())))
    };
    let id = given.map(str::to_string).or_else(slurm).ok_or(Error::NoJobId)?;
    match id.is_empty() || id.contains('/') {
        true => Err(Error::JobId { found: id }),
        false => Ok(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_named_by_the_flag_or_by_the_slurm_step() {
        let slurm = |name: &str| match name {
            "SLURM_JOB_ID" => Some("17".to_string()),
            "SLURM_STEP_ID" => Some("0".to_string()),
            _ => None,
        };
        let requeued = |name: &str| if name == "SLURM_RESTART_COUNT" { Some("1".to_string()) } else { slurm(name) };
        assert_eq!(job_id(Some("a run"), &slurm).unwrap(), "a run");
        assert_eq!(job_id(None, &slurm).unwrap(), "slurm-17.0.0");
        assert_eq!(job_id(None, &requeued).unwrap(), "slurm-17.0.1");
        assert!(matches!(job_id(None, &|_| None), Err(Error::NoJobId)));
        for wrong in ["", "a/b"] {
            assert!(matches!(job_id(Some(wrong), &slurm), Err(Error::JobId { .. })), "{wrong:?}");
        }
    }
}
