//! Asking again and again, soon at first and then less often.

use std::thread;
use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(250);

/// The answer of `ask` as soon as it has one; nothing where it has none within `timeout`. Asks at least once.
pub(super) fn poll<T, E>(timeout: Duration, mut ask: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
    let started = Instant::now();
    let mut pause = FIRST;
    loop {
        if let Some(answer) = ask()? {
            return Ok(Some(answer));
        }
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_the_asking_and_so_does_an_error() {
        let answers = [Ok(None), Ok(None), Ok(Some(3)), Err("never asked")];
        let mut next = answers.into_iter();
        assert_eq!(poll(Duration::from_secs(60), || next.next().unwrap()), Ok(Some(3)));
        assert_eq!(poll(Duration::from_secs(60), || Err::<Option<()>, _>("down")), Err("down"));
    }

    #[test]
    fn it_is_asked_at_least_once_and_not_after_its_time() {
        let mut asked = 0;
        let mut ask = |timeout| {
            poll(timeout, || {
                asked += 1;
                Ok::<Option<usize>, ()>((asked == 4).then_some(asked))
            })
        };
        assert_eq!(ask(Duration::ZERO), Ok(None));
        let started = Instant::now();
        assert_eq!(ask(Duration::from_millis(1)), Ok(None));
        assert!(started.elapsed() >= Duration::from_millis(1));
        assert_eq!(ask(Duration::from_secs(60)), Ok(Some(4)), "once, and at the beginning and end of 1 ms, before");
    }
}
