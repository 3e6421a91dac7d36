//! Progress of long work: bars on a terminal, plain lines elsewhere, nothing under `--quiet`.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line is printed at most.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Shows one piece of work at a time.
pub struct Reporter {
    quiet: bool,
    terminal: bool,
    current: Mutex<Option<Work>>,
    last_plain: AtomicU64,
    started: Instant,
}

struct Work {
    label: String,
    bar: ProgressBar,
    finished: bool,
}

impl Reporter {
    /// A reporter for standard error.
    pub fn new(quiet: bool) -> Reporter {
        let terminal = std::io::stderr().is_terminal();
        Reporter { quiet, terminal, current: Mutex::default(), last_plain: AtomicU64::new(0), started: Instant::now() }
    }

    /// Bytes done of bytes in all (0: not known) of the work called `label`.
    pub fn bytes(&self, label: &str, done: u64, total: u64) {
        if self.quiet {
            return;
        }
        let Ok(mut current) = self.current.lock() else { return };
        let is_new = current.as_ref().is_none_or(|w| w.label != label);
        if is_new {
            if let Some(work) = current.take() {
                work.bar.finish_and_clear();
            }
            *current = Some(Work { label: label.into(), bar: self.bar(label, total), finished: false });
        }
        let Some(work) = current.as_mut().filter(|w| !w.finished) else { return };
        work.bar.set_length(total.max(done));
        work.bar.set_position(done);
        let finished = total > 0 && done >= total;
        if !self.terminal {
            let now = self.started.elapsed().as_millis() as u64;
            let due = now.saturating_sub(self.last_plain.load(Ordering::Relaxed)) >= PLAIN_EVERY.as_millis() as u64;
            if is_new || finished || due {
                self.last_plain.store(now, Ordering::Relaxed);
                eprintln!("{label}: {} of {}", mebibytes(done), mebibytes(total));
            }
        }
        if finished {
            work.bar.finish_and_clear();
            work.finished = true;
        }
    }

    /// A line that says what is going on; on a terminal it is replaced by the next.
    pub fn say(&self, message: &str) {
        if self.quiet {
            return;
        }
        self.clear();
        if !self.terminal {
            eprintln!("{message}");
            return;
        }
        let bar = ProgressBar::new_spinner().with_message(message.to_string());
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(100));
        if let Ok(mut current) = self.current.lock() {
            *current = Some(Work { label: message.into(), bar, finished: false });
        }
    }

    /// A line that stays.
    pub fn note(&self, message: &str) {
        self.clear();
        if !self.quiet {
            eprintln!("{message}");
        }
    }

    /// Takes what is shown off the screen.
    pub fn clear(&self) {
        if let Ok(mut current) = self.current.lock()
            && let Some(work) = current.take()
        {
            work.bar.finish_and_clear();
        }
    }

    fn bar(&self, label: &str, total: u64) -> ProgressBar {
        let target = if self.terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(label.to_string())
    }
}

/// `93.9 MiB`.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
