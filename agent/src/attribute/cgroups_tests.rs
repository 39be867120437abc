//! Mount tables as data, and the table against the cgroups of the running kernel.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use super::{
    super::testing::{TestCgroup, mount},
    *,
};

const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw\n";
const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
const IN_CONTAINER: &str = "\
50 40 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw
51 40 0:26 /../../.. /host/a\\040b\\134c ro,nosuid - cgroup2 cgroup2 rw
";
const NONE: &str = "\
31 23 0:28 / /cgroup2 rw - tmpfs cgroup2 rw
32 23 0:28 /cgroup2 /x rw cgroup2 - ext4 cgroup2 rw
33 23 0:28 / /no-dash rw cgroup2
";

fn check(text: &str, points: &[&str]) {
    let points: Vec<_> = points.iter().map(PathBuf::from).collect();
    assert_eq!(cgroup2_mounts(text.as_bytes()), points, "{text}");
}

#[test]
fn mount_points() {
    check(V2, &["/sys/fs/cgroup"]);
    check(HYBRID, &["/sys/fs/cgroup/unified"]);
    check(IN_CONTAINER, &["/sys/fs/cgroup", "/host/a b\\c"]);
    check(NONE, &[]);
    check("", &[]);
    check("1 2 3 4 /a\\777\\04 rw - cgroup2 x rw", &["/a\\777\\04"]);
}

#[test]
fn long_paths_become_the_ancestor() {
    let name = format!("/{}", "x".repeat(99));
    assert_eq!(cut(&name.repeat(10)), name.repeat(10));
    assert_eq!(cut(&name.repeat(11)), name.repeat(10));
    assert_eq!(cut(&format!("/{}", "é".repeat(600))), "/");
    assert_eq!(cut(&"x".repeat(2000)), "/");
}

#[test]
fn an_id_that_is_new_is_asked_for_and_stays_known() {
    let Some(mount) = mount() else { return };
    let mut table = Cgroups::new();
    let before = table.stats();
    let cgroup = TestCgroup::new(&mount.point);
    let (path, id) = cgroup.make("a/b c");
    let expected = format!("/{}", path.strip_prefix(&mount.point).unwrap().display());
    assert_eq!(table.path(id).as_deref(), Ok(&*expected));
    drop(cgroup);
    assert_eq!(table.path(id).as_deref(), Ok(&*expected));
    let after = table.stats();
    assert_eq!((after.asked, after.walks), (before.asked + 1, before.walks));
}

#[test]
fn an_id_that_nothing_has_any_more_is_asked_for_once() {
    let Some(mount) = mount() else { return };
    let mut table = Cgroups::new();
    let cgroup = TestCgroup::new(&mount.point);
    let (_, id) = cgroup.make("a");
    drop(cgroup);
    for _ in 0..3 {
        assert_eq!(table.path(id), Err(Error::Gone(id)));
    }
    assert_eq!((table.stats().asked, table.stats().gone), (1, 1));
}

#[test]
fn without_the_capability_the_tree_is_walked_at_a_bounded_rate() {
    let Some(mount) = mount() else { return };
    let cgroup = TestCgroup::new(&mount.point);
    let (_, early) = cgroup.make("early");
    let mut table = Cgroups::new();
    table.root = None;
    let (late_path, late) = cgroup.make("late");
    assert!(table.path(early).unwrap().ends_with("/early"));

    table.next_walk = Some(Instant::now() + Duration::from_secs(3600));
    assert_eq!(table.path(late), Err(Error::Later(late)));
    assert_eq!(table.stats().walks, 1);

    table.next_walk = Some(Instant::now());
    let below = late_path.strip_prefix(&mount.point).unwrap();
    assert_eq!(table.path(late).as_deref(), Ok(&*format!("/{}", below.display())));
    assert_eq!((table.stats().walks, table.stats().asked), (2, 0));
    assert!(table.next_walk.unwrap() > Instant::now());
}

#[test]
fn the_root_and_nothing() {
    let mut table = Cgroups::new();
    assert_eq!(table.path(CgroupId(ROOT)).as_deref(), Ok("/"));
    assert_eq!(table.path(CgroupId(0)), Err(Error::Unknown));
}

#[test]
fn a_walk_is_bounded_and_takes_the_outer_ones_first() {
    let Some(mount) = mount() else { return };
    let cgroup = TestCgroup::new(&mount.point);
    let inner: Vec<_> = ["a/x", "b/x"].iter().map(|below| cgroup.make(below).1).collect();
    let outer: Vec<_> = ["a", "b"].iter().map(|below| cgroup.make(below).1).collect();
    let (all, skipped) = walk(cgroup.path(), 100);
    assert_eq!((all.len(), skipped), (5, 0));
    let (some, skipped) = walk(cgroup.path(), 3);
    let ids: Vec<_> = some.iter().map(|(id, _)| *id).collect();
    assert_eq!((ids.len(), skipped), (3, 2));
    assert!(outer.iter().all(|id| ids.contains(id)) && !inner.iter().any(|id| ids.contains(id)));
}

#[test]
fn descendants_by_every_way_to_write_a_path() {
    let Some(mount) = mount() else { return };
    let cgroup = TestCgroup::new(&mount.point);
    let ids: Vec<_> = ["", "a", "a/x"].iter().map(|below| cgroup.make(below).1).collect();
    let name = cgroup.path().strip_prefix(&mount.point).unwrap();
    for path in [cgroup.path(), name, &Path::new("/").join(name)] {
        assert_eq!(descendants(path, 100).as_ref(), Ok(&ids), "{}", path.display());
    }
    assert_eq!(descendants(&name.join("a"), 100).unwrap(), ids[1..]);
    assert!(descendants(Path::new("/"), 100_000).unwrap().len() >= 4);
}

#[test]
fn what_is_no_cgroup_is_said() {
    let Some(mount) = mount() else { return };
    let cgroup = TestCgroup::new(&mount.point);
    let name = cgroup.path().strip_prefix(&mount.point).unwrap();
    let _below = cgroup.make("a");
    let message = |path: &Path, limit| descendants(path, limit).unwrap_err().to_string();
    let at = cgroup.path().display();
    let paths = format!("(paths are below the cgroup2 mount {})", mount.point.display());
    assert_eq!(
        message(&name.join("none"), 9),
        format!("no cgroup at {at}/none: No such file or directory (os error 2) {paths}")
    );
    assert_eq!(
        message(&name.join("../x"), 9),
        format!("no cgroup at {at}/../x: \"..\" leads out of it {paths}")
    );
    assert_eq!(
        message(&name.join("cgroup.procs"), 9),
        format!("no cgroup at {at}/cgroup.procs: it is no directory of cgroup2 {paths}")
    );
    assert_eq!(
        message(name, 1),
        format!("more than 1 cgroups at and below {at}: choose one further down")
    );
}
