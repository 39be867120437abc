//! Cgroups (v2) that come and go: the agent is told of them at once, and a new one is filtered as
//! the one that it is in, before anything can run in it.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use podflame_wire::CgroupChange;

use crate::{
    fields::*,
    maps::{CGROUP_CHANGES, CGROUPS},
};

/// A cgroup was made: the argument is it (`include/trace/events/cgroup.h`).
#[btf_tracepoint(function = "cgroup_mkdir")]
pub(crate) fn cgroup_made(ctx: BtfTracePointContext) -> i32 {
    let cgroup: *const u8 = ctx.arg(0);
    // SAFETY: a typed pointer, and each offset is of the type it is used with.
    let Some(id) = (unsafe { unified_id(cgroup) }) else { return 0 };
    // SAFETY: as above; the parent's state leads to the parent.
    let parent = unsafe {
        read::<*const u8>(cgroup, &CGROUP_PARENT)
            .and_then(|state| read::<*const u8>(state, &CSS_CGROUP))
            .and_then(|parent| id_of(parent))
    };
    if let Some(parent) = parent {
        // SAFETY: the value is copied out at once.
        if let Some(verdict) = unsafe { CGROUPS.get(parent) }.copied() {
            // A full map leaves it to the agent, which follows.
            let _ = CGROUPS.insert(id, verdict, 0);
        }
    }
    tell(CgroupChange { id, gone: 0 });
    0
}

/// A cgroup is removed.
#[btf_tracepoint(function = "cgroup_rmdir")]
pub(crate) fn cgroup_removed(ctx: BtfTracePointContext) -> i32 {
    let cgroup: *const u8 = ctx.arg(0);
    // SAFETY: as in `cgroup_made`. Its last events may still come, so it stays in the filter.
    if let Some(id) = unsafe { unified_id(cgroup) } {
        tell(CgroupChange { id, gone: 1 });
    }
    0
}

/// A change that finds no room is missed: the agent walks the tree now and then.
fn tell(change: CgroupChange) {
    let _ = CGROUP_CHANGES.output::<CgroupChange>(change, 0);
}

/// The ID of a cgroup of v2, whose hierarchy is the first one made and has the number 0; IDs of v1
/// hierarchies are numbered apart and would be taken for others.
///
/// # Safety
///
/// `cgroup` must be a typed pointer to a cgroup.
#[inline(always)]
unsafe fn unified_id(cgroup: *const u8) -> Option<u64> {
    // SAFETY: the caller's promise; the root's type is again known.
    unsafe {
        let root: *const u8 = read(cgroup, &CGROUP_ROOT)?;
        let hierarchy: i32 = read(root, &CGROUP_ROOT_HIERARCHY)?;
        if hierarchy != 0 {
            return None;
        }
        id_of(cgroup)
    }
}

/// # Safety
///
/// As in [`unified_id`].
#[inline(always)]
unsafe fn id_of(cgroup: *const u8) -> Option<u64> {
    // SAFETY: the caller's promise.
    unsafe {
        let node: *const u8 = read(cgroup, &CGROUP_KN)?;
        read(node, &KERNFS_NODE_ID)
    }
}
