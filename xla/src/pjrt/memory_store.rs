//! A key-value store inside one process: for clients that share it, and for tests.

use super::error::Code;
use super::key_value::{KeyValueError, KeyValueStore};
use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Keys and values in this process's memory.
#[derive(Default)]
pub struct MemoryStore {
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    changed: Condvar,
}

impl MemoryStore {
    fn values(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Vec<u8>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyValueStore for MemoryStore {
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KeyValueError> {
        let absent = |values: &mut HashMap<Vec<u8>, Vec<u8>>| !values.contains_key(key);
        let waited = self.changed.wait_timeout_while(self.values(), timeout, absent);
        let (values, _) = waited.unwrap_or_else(PoisonError::into_inner);
        values.get(key).cloned().ok_or_else(|| {
            let key = String::from_utf8_lossy(key);
            let message = format!("nobody put the key {key:?} into this process's store within {timeout:?}");
            KeyValueError::new(Code::DeadlineExceeded, message)
        })
    }

    fn try_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KeyValueError> {
        Ok(self.values().get(key).cloned())
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError> {
        self.values().insert(key.to_vec(), value.to_vec());
        self.changed.notify_all();
        Ok(())
    }
}
