//! What the owner of the tables does where the kernel refuses, on maps that no program reads.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use super::*;

/// An owner of maps for so many processes. Without root there is none, which CI does not accept.
fn unwinder(processes: u32) -> Option<Unwinder> {
    // SAFETY: has no conditions.
    if unsafe { libc::geteuid() } != 0 {
        let reason = "needs root";
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        eprintln!("not run: {reason}");
        return None;
    }
    let (told, _) = watch::channel(Unwinding::default());
    Some(Unwinder::new(Tables::alone(processes).unwrap(), told))
}

/// Publishes three mappings of the one file there is.
fn publish(unwinder: &mut Unwinder, pid: u32) -> Result<(), MapError> {
    let process = ProcessKey { pid, start_ns: 1, exec_id: 0 };
    let told = Told { process, code: Vec::new(), at: Instant::now() };
    let mut space = Vec::new();
    for start in [0x1000, 0x3000, 0x5000] {
        add_without(&mut space, start, start + 0x1000, MappingKind::NoTable);
    }
    unwinder.publish(&told, space, vec![FileKey::default()])
}

#[test]
fn a_process_that_the_kernel_refuses_leaves_nothing_behind() {
    let Some(mut unwinder) = unwinder(1) else { return };
    let state = State::None(MappingKind::NoTable);
    unwinder.files.insert(FileKey::default(), Entry { state, users: 0, used: 0 });
    publish(&mut unwinder, 1).unwrap();
    for _ in 0..3 {
        // There is room for one process.
        assert!(publish(&mut unwinder, 2).is_err());
        assert_eq!(unwinder.files[&FileKey::default()].users, 1);
        assert_eq!(unwinder.known.keys().copied().collect::<Vec<_>>(), [1]);
    }
    unwinder.forget(1);
    assert_eq!(unwinder.files[&FileKey::default()].users, 0);
    publish(&mut unwinder, 2).unwrap();
    // Behind what rests of the first, and nothing in between is lost.
    assert_eq!(unwinder.known[&2].first, 3);
}

/// What is told of a large program can come last, and be of the past by then.
#[test]
fn a_program_stays_where_an_earlier_one_of_its_process_comes_late() {
    let Some(mut unwinder) = unwinder(2) else { return };
    let told = |start_ns, exec_id| {
        let process = ProcessKey { pid: 1, start_ns, exec_id };
        Told { process, code: Vec::new(), at: Instant::now() }
    };
    let known = |unwinder: &Unwinder| {
        let process = unwinder.known[&1].process;
        (process.start_ns, process.exec_id)
    };
    for ((start_ns, exec_id), expected) in [
        ((7, 3), (7, 3)),
        ((7, 2), (7, 3)),
        ((7, 4), (7, 4)),
        ((5, 9), (7, 4)),
        // The PID was used again.
        ((8, 1), (8, 1)),
        // The kernel did not say when it started.
        ((0, 0), (0, 0)),
        ((0, 5), (0, 5)),
        ((0, 4), (0, 4)),
    ] {
        unwinder.take(told(start_ns, exec_id)).unwrap();
        assert_eq!(known(&unwinder), expected, "after {start_ns}, {exec_id}");
    }
}
