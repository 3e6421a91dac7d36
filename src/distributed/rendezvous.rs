//! How processes find out that all have come, even where a run of the same name has just crashed.
//!
//! Keys live for a while after their process, so what a crashed run left could be taken for what this one says. Each
//! process therefore has a number that is new (its lease), and four kinds of keys settle which numbers belong together:
//!
//! ```text
//! member/I/join   process I came: its number, and how many processes it knows of
//! plan/session    process 0 saw a join of each: a name, and all numbers
//! member/I/ack    process I found its own number in the session of this name
//! plan/start      all have: the session begins
//! ```
//!
//! A session with an old number in it is acknowledged by nobody, and is replaced when the new process's join is seen.
//! What the processes tell each other afterwards lies below the number of process 0. Nothing here talks to a server.

use std::collections::BTreeMap;

/// A process's number: its lease.
type Number = i64;

/// Key of process `index`'s join, below the job's prefix.
pub(super) fn join_key(index: usize) -> String {
    format!("{MEMBER_PREFIX}{index}/join")
}

/// Key of process `index`'s acknowledgement.
pub(super) fn ack_key(index: usize) -> String {
    format!("{MEMBER_PREFIX}{index}/ack")
}

pub(super) const MEMBER_PREFIX: &str = "member/";
pub(super) const PLAN_PREFIX: &str = "plan/";
pub(super) const SESSION_KEY: &str = "plan/session";
pub(super) const START_KEY: &str = "plan/start";

/// Keys, without the job's prefix, and their values.
pub(super) type Keys = BTreeMap<String, String>;

/// What a join key holds.
pub(super) fn join_value(number: Number, count: usize) -> String {
    format!("{number} of {count}")
}

/// Processes that belong together, process 0 first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    /// How many sessions process 0 has proposed before.
    serial: usize,
    numbers: Vec<Number>,
}

impl Session {
    /// What acknowledgements and the start say.
    pub(super) fn name(&self) -> String {
        format!("{:x}.{}", self.numbers[0], self.serial)
    }

    /// What the session key holds.
    pub(super) fn value(&self) -> String {
        let numbers: Vec<String> = self.numbers.iter().map(ToString::to_string).collect();
        format!("{} {}", self.serial, numbers.join(" "))
    }

    fn parse(value: &str) -> Option<Session> {
        let (serial, numbers) = value.split_once(' ')?;
        let numbers = numbers.split(' ').map(|n| n.parse().ok()).collect::<Option<Vec<_>>>()?;
        Some(Session { serial: serial.parse().ok()?, numbers })
    }

    /// Prefix of the keys of this session's processes, below the job's.
    pub(super) fn prefix(&self) -> String {
        format!("run/{:x}/", self.numbers[0])
    }
}

/// What process 0 does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// Waits for these processes.
    Wait(Vec<usize>),
    /// Another process says that it is process 0.
    Duplicate,
    /// Puts this session.
    Propose(Session),
    /// Puts the start of the session it proposed.
    Start,
}

/// The next step of process 0 (`own` is its number) of `count`, which has proposed `proposed` and sees `members`.
pub(super) fn lead(own: Number, count: usize, members: &Keys, proposed: Option<&Session>) -> Lead {
    let joined = |index: usize| {
        let (number, of) = members.get(&join_key(index))?.split_once(" of ")?;
        // One that knows of another count is a process of another run.
        (of.parse() == Ok(count)).then(|| number.parse::<Number>().ok()).flatten()
    };
    let numbers: Vec<Option<Number>> = (0..count).map(joined).collect();
    if numbers[0] != Some(own) {
        return Lead::Duplicate;
    }
    let Some(numbers) = numbers.iter().copied().collect::<Option<Vec<_>>>() else {
        return Lead::Wait((0..count).filter(|&i| numbers[i].is_none()).collect());
    };
    match proposed {
        Some(session) if session.numbers == numbers => {
            let name = session.name();
            let silent: Vec<usize> = (1..count).filter(|&i| members.get(&ack_key(i)) != Some(&name)).collect();
            if silent.is_empty() { Lead::Start } else { Lead::Wait(silent) }
        }
        _ => Lead::Propose(Session { serial: proposed.map_or(0, |s| s.serial + 1), numbers }),
    }
}

/// What another process does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Follow {
    /// Nothing that has this process in it is proposed.
    Wait,
    /// Acknowledges a session that is not begun yet.
    Acknowledge(Session),
    /// Its session has begun.
    Started(Session),
}

/// The next step of process `index`, whose number is `own` and which sees `plan`.
pub(super) fn follow(own: Number, index: usize, plan: &Keys) -> Follow {
    let session = plan.get(SESSION_KEY).and_then(|v| Session::parse(v));
    match session.filter(|s| s.numbers.get(index) == Some(&own)) {
        Some(session) if plan.get(START_KEY) == Some(&session.name()) => Follow::Started(session),
        Some(session) => Follow::Acknowledge(session),
        None => Follow::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store and processes that take one step at a time.
    #[derive(Default)]
    struct World {
        keys: Keys,
        proposed: Option<Session>,
    }

    impl World {
        fn join(&mut self, index: usize, number: Number) {
            self.keys.insert(join_key(index), join_value(number, 3));
        }

        fn lead(&mut self, own: Number) -> Lead {
            let step = lead(own, 3, &self.keys, self.proposed.as_ref());
            match &step {
                Lead::Propose(session) => {
                    self.keys.insert(SESSION_KEY.into(), session.value());
                    self.proposed = Some(session.clone());
                }
                Lead::Start => {
                    self.keys.insert(START_KEY.into(), self.proposed.as_ref().unwrap().name());
                }
                Lead::Wait(_) | Lead::Duplicate => {}
            }
            step
        }

        fn follow(&mut self, index: usize, own: Number) -> Follow {
            let step = follow(own, index, &self.keys);
            if let Follow::Acknowledge(session) = &step {
                self.keys.insert(ack_key(index), session.name());
            }
            step
        }
    }

    #[test]
    fn three_processes_meet() {
        let mut world = World::default();
        world.join(0, 10);
        assert_eq!(world.lead(10), Lead::Wait(vec![1, 2]));
        assert_eq!(world.follow(2, 12), Follow::Wait);
        world.join(2, 12);
        world.join(1, 11);
        let session = Session { serial: 0, numbers: vec![10, 11, 12] };
        assert_eq!(world.lead(10), Lead::Propose(session.clone()));
        assert_eq!(world.follow(1, 11), Follow::Acknowledge(session.clone()));
        assert_eq!(world.lead(10), Lead::Wait(vec![2]));
        assert_eq!(world.follow(2, 12), Follow::Acknowledge(session.clone()));
        assert_eq!(world.lead(10), Lead::Start);
        for (index, own) in [(1, 11), (2, 12)] {
            assert_eq!(world.follow(index, own), Follow::Started(session.clone()));
        }
        assert_eq!(session.prefix(), "run/a/");
    }

    #[test]
    fn what_a_crashed_run_left_begins_nothing() {
        let mut world = World::default();
        for (index, number) in [10, 11, 12].into_iter().enumerate() {
            world.join(index, number);
        }
        world.lead(10);
        world.follow(1, 11);
        world.follow(2, 12);
        world.lead(10);
        // All crash. Process 2 is the first to come again, and finds a session that has begun without it.
        world.proposed = None;
        world.join(2, 22);
        assert_eq!(world.follow(2, 22), Follow::Wait);
        // Process 0 takes process 1's old join for a new one; nobody acknowledges that session for process 1.
        world.join(0, 20);
        assert_eq!(world.lead(20), Lead::Propose(Session { serial: 0, numbers: vec![20, 11, 22] }));
        assert!(matches!(world.follow(2, 22), Follow::Acknowledge(_)));
        assert_eq!(world.lead(20), Lead::Wait(vec![1]));
        world.join(1, 21);
        assert_eq!(world.follow(1, 21), Follow::Wait);
        let session = Session { serial: 1, numbers: vec![20, 21, 22] };
        assert_eq!(world.lead(20), Lead::Propose(session.clone()));
        assert_eq!(world.follow(1, 21), Follow::Acknowledge(session.clone()));
        // Process 2 acknowledged the session before this one.
        assert_eq!(world.lead(20), Lead::Wait(vec![2]));
        assert_eq!(world.follow(2, 22), Follow::Acknowledge(session.clone()));
        assert_eq!(world.lead(20), Lead::Start);
        assert_eq!(world.follow(1, 21), Follow::Started(session));
    }

    #[test]
    fn another_leader_and_another_count_are_noticed() {
        let mut world = World::default();
        for (index, number) in [10, 11, 12].into_iter().enumerate() {
            world.join(index, number);
        }
        world.keys.insert(join_key(1), join_value(11, 2));
        assert_eq!(world.lead(10), Lead::Wait(vec![1]));
        world.join(0, 99);
        assert_eq!(world.lead(10), Lead::Duplicate);
    }

    #[test]
    fn a_process_alone_starts_at_once() {
        let members = Keys::from([(join_key(0), join_value(7, 1))]);
        let Lead::Propose(session) = lead(7, 1, &members, None) else { panic!("nobody to wait for") };
        assert_eq!(lead(7, 1, &members, Some(&session)), Lead::Start);
        assert_eq!(Session::parse(&session.value()), Some(session));
        assert_eq!(Session::parse("something else"), None);
    }
}
