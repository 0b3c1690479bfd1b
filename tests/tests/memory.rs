//! Memory of all kinds.

use ckpt_tests::{Target, process};

crate::survives! {
    private_memory_keeps_bytes_and_holes: "memory_private";
    file_mappings_keep_own_pages_and_stay_shared: "memory_file";
    shared_memory_stays_shared_between_three_generations: "memory_shared";
    heap_and_stack_grow_after_restore: "memory_growth";
    mlock_and_madvise_still_hold: "memory_flags";
    vdso_tells_time_after_restore: "memory_vdso";
    full_address_space_has_room_for_a_checkpoint: "address_space_full";
}

#[test]
fn images_of_sparse_memory_are_small() {
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let size: u64 = std::fs::read_dir(&img)
        .expect("list images")
        .flatten()
        .map(|f| f.metadata().map_or(0, |m| m.len()))
        .sum();
    let resident: u64 = process::text(target.pid, "status")
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:")?.trim().trim_end_matches(" kB").parse().ok())
        .expect("VmRSS");
    assert!(size < resident * 1024, "{size} bytes of images for {resident} KiB of resident memory");
}
