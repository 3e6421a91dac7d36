//! A lease that lives as long as its process.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use super::error::Error;
use super::etcd::Etcd;

/// A third of [`TTL`](super::etcd::TTL): two renewals may fail before the lease is over.
const RENEWAL: Duration = Duration::from_secs(10);

/// A lease that a thread renews until this is dropped.
pub(super) struct Lease {
    id: i64,
    /// Its end tells the thread to stop.
    _alive: Sender<()>,
}

impl Lease {
    pub(super) fn begin(etcd: &Etcd) -> Result<Lease, Error> {
        let id = etcd.grant_lease()?;
        let (alive, ended) = mpsc::channel::<()>();
        let etcd = etcd.clone();
        let renew = move || {
            while ended.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                match etcd.keep_lease_alive(id) {
                    Ok(true) => {}
                    // The next put says so.
                    Ok(false) => return,
                    // It may be back for the next renewal; where it is not, the next get or put says so.
                    Err(e) => tracing::warn!("{e}"),
                }
            }
        };
        // Detached: the process ends without waiting for it.
        thread::spawn(renew);
        Ok(Lease { id, _alive: alive })
    }

    /// The server's number for it, which no other has.
    pub(super) fn id(&self) -> i64 {
        self.id
    }
}
