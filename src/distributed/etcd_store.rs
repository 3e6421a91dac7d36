//! The store of a run on an etcd server.
//!
//! Keys lie under `/xllama/JOB/`, and go away 30 s after the process that put them ended, however it ended. A run that
//! is started again under the same name, even at once, reads nothing of the one before ([`super::rendezvous`]).

use std::time::{Duration, Instant};

use xla::pjrt::{Code, KeyValueError, KeyValueStore};

use super::error::Error;
use super::etcd::{Etcd, Pair};
use super::lease::Lease;
use super::poll::poll;
use super::process::Process;
use super::rendezvous::{self, Follow, Keys, Lead, MEMBER_PREFIX, PLAN_PREFIX, SESSION_KEY, START_KEY, Session};

/// Which run to join, and where.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// The etcd server, as `http://HOST:PORT`.
    pub address: String,
    /// The run's name: the same for its processes, and different from that of any other run at the time.
    pub job: String,
    /// How long to wait for the other processes.
    pub timeout: Duration,
}

/// Keys of one run, which its processes and nobody else see.
pub struct EtcdStore {
    etcd: Etcd,
    lease: Lease,
    job: String,
    prefix: String,
}

impl EtcdStore {
    /// Joins the run as `process`. Returns when all of its processes have.
    ///
    /// # Errors
    /// The server does not answer, two processes have one index, or one has not come in time.
    pub fn join(options: &JoinOptions, process: Process) -> Result<EtcdStore, Error> {
        let etcd = Etcd::new(&options.address)?;
        let lease = Lease::begin(&etcd)?;
        let mut meeting = Meeting { etcd: &etcd, lease: &lease, options, process, started: Instant::now() };
        meeting.put(&rendezvous::join_key(process.index()), &rendezvous::join_value(lease.id(), process.count()))?;
        let session = match process.is_leader() {
            true => meeting.lead()?,
            false => meeting.follow()?,
        };
        let prefix = format!("{}{}", job_prefix(&options.job), session.prefix());
        Ok(EtcdStore { etcd, lease, job: options.job.clone(), prefix })
    }

    /// The server.
    pub fn address(&self) -> &str {
        self.etcd.address()
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [self.prefix.as_bytes(), key].concat()
    }
}

impl KeyValueStore for EtcdStore {
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KeyValueError> {
        let full_key = self.full_key(key);
        let found = poll(timeout, || self.etcd.get(&full_key)).map_err(|e| for_plugin(&e))?;
        found.ok_or_else(|| {
            for_plugin(&Error::Timeout {
                key: String::from_utf8_lossy(key).into_owned(),
                address: self.address().into(),
                job: self.job.clone(),
                waited: timeout,
            })
        })
    }

    fn try_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KeyValueError> {
        self.etcd.get(&self.full_key(key)).map_err(|e| for_plugin(&e))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError> {
        self.etcd.put(&self.full_key(key), value, self.lease.id()).map_err(|e| for_plugin(&e))
    }
}

fn for_plugin(error: &Error) -> KeyValueError {
    let code = match error {
        Error::Timeout { .. } => Code::DeadlineExceeded,
        Error::Unreachable { .. } => Code::Unavailable,
        _ => Code::Internal,
    };
    KeyValueError::new(code, error.to_string())
}

/// A process on its way into a session.
struct Meeting<'a> {
    etcd: &'a Etcd,
    lease: &'a Lease,
    options: &'a JoinOptions,
    process: Process,
    started: Instant,
}

impl Meeting<'_> {
    /// Proposes sessions until all processes have acknowledged one.
    fn lead(&mut self) -> Result<Session, Error> {
        let mut proposed: Option<Session> = None;
        let mut missing = Vec::new();
        let session = poll::<_, Error>(self.options.timeout, || {
            let members = self.keys(MEMBER_PREFIX)?;
            match rendezvous::lead(self.lease.id(), self.process.count(), &members, proposed.as_ref()) {
                Lead::Wait(processes) => missing = processes,
                Lead::Duplicate => return Err(self.duplicate()),
                Lead::Propose(session) => {
                    self.put(SESSION_KEY, &session.value())?;
                    missing = (1..self.process.count()).collect();
                    proposed = Some(session);
                }
                Lead::Start => {
                    let session = proposed.take().expect("a session starts after it was proposed");
                    self.put(START_KEY, &session.name())?;
                    return Ok(Some(session));
                }
            }
            Ok(None)
        })?;
        session.ok_or_else(|| Error::Missing {
            missing,
            count: self.process.count(),
            job: self.options.job.clone(),
            address: self.etcd.address().into(),
            waited: self.started.elapsed(),
        })
    }

    /// Acknowledges sessions until one has begun.
    fn follow(&mut self) -> Result<Session, Error> {
        let (own, index) = (self.lease.id(), self.process.index());
        let mut acknowledged: Option<Session> = None;
        let session = poll::<_, Error>(self.options.timeout, || {
            match rendezvous::follow(own, index, &self.keys(PLAN_PREFIX)?) {
                Follow::Started(session) => return Ok(Some(session)),
                Follow::Acknowledge(session) if acknowledged.as_ref() != Some(&session) => {
                    self.put(&rendezvous::ack_key(index), &session.name())?;
                    acknowledged = Some(session);
                }
                Follow::Acknowledge(_) | Follow::Wait => {}
            }
            Ok(None)
        })?;
        if let Some(session) = session {
            return Ok(session);
        }
        let joined = self.keys(MEMBER_PREFIX)?.remove(&rendezvous::join_key(index));
        if joined != Some(rendezvous::join_value(own, self.process.count())) {
            return Err(self.duplicate());
        }
        Err(Error::NotStarted {
            index,
            job: self.options.job.clone(),
            address: self.etcd.address().into(),
            waited: self.started.elapsed(),
        })
    }

    fn put(&self, key: &str, value: &str) -> Result<(), Error> {
        self.etcd.put(format!("{}{key}", job_prefix(&self.options.job)).as_bytes(), value.as_bytes(), self.lease.id())
    }

    fn keys(&self, prefix: &str) -> Result<Keys, Error> {
        let job = job_prefix(&self.options.job);
        let pairs = self.etcd.get_prefix(format!("{job}{prefix}").as_bytes())?;
        let text = |(key, value): Pair| {
            let key = String::from_utf8(key).ok()?;
            Some((key.strip_prefix(&job)?.to_string(), String::from_utf8(value).ok()?))
        };
        Ok(pairs.into_iter().filter_map(text).collect())
    }

    fn duplicate(&self) -> Error {
        Error::Duplicate { index: self.process.index(), job: self.options.job.clone() }
    }
}

fn job_prefix(job: &str) -> String {
    format!("/xllama/{job}/")
}
