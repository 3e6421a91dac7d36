//! One value from each process.

use std::time::Duration;

use xla::pjrt::KeyValueStore;

use super::error::Error;
use super::process::Process;

/// Gives `value` to the other processes and returns all values in the order of the processes, this one's included.
/// Nobody gets an answer before everybody has called, so without values it is a barrier.
///
/// `name` is used once in a run: a second gather of the same name could see the first one's values.
///
/// # Errors
/// [`Error::Absent`] names a process that has not called within `timeout`.
pub fn gather(
    store: &dyn KeyValueStore,
    process: Process,
    name: &str,
    value: &[u8],
    timeout: Duration,
) -> Result<Vec<Vec<u8>>, Error> {
    let key = |index: usize| format!("gather/{name}/{index}").into_bytes();
    store.put(&key(process.index()), value)?;
    let value_of = |index: usize| {
        let absent = |source| Error::Absent { process: index, name: name.into(), source };
        store.get(&key(index), timeout).map_err(absent)
    };
    (0..process.count()).map(value_of).collect()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use xla::pjrt::MemoryStore;

    use super::*;

    #[test]
    fn every_process_gets_the_values_of_all() {
        let store = MemoryStore::default();
        let results: Vec<_> = thread::scope(|scope| {
            let call = |index: usize| {
                let (store, process) = (&store, Process::new(index, 3).unwrap());
                let value = vec![index as u8; index];
                scope.spawn(move || gather(store, process, "shapes", &value, Duration::from_secs(60)).unwrap())
            };
            let calls: Vec<_> = (0..3).map(call).collect();
            calls.into_iter().map(|c| c.join().unwrap()).collect()
        });
        assert_eq!(results, vec![vec![vec![], vec![1], vec![2, 2]]; 3]);
    }

    #[test]
    fn the_process_that_does_not_come_is_named() {
        let process = Process::new(0, 2).unwrap();
        let store = MemoryStore::default();
        let error = gather(&store, process, "shapes", b"", Duration::from_millis(10)).unwrap_err().to_string();
        assert!(error.starts_with("process 1 has not come to \"shapes\": "), "{error}");
    }
}
