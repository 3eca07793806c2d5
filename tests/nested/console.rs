//! The signs of a fault of the emulator on the console of a guest.

use std::sync::atomic::{AtomicBool, Ordering};

/// The reason for which a trial is skipped whose guest ended as [`shows_doubled_interrupt`] or [`shows_interrupted_handler`] says.
pub const DOUBLED_INTERRUPT: &str = "the emulated processor delivered an interrupt to the guest twice";

static SEEN: AtomicBool = AtomicBool::new(false);

/// Notes the console of a guest that is gone.
pub fn examine(console: &str) {
    if shows_doubled_interrupt(console) || shows_interrupted_handler(console) {
        SEEN.store(true, Ordering::Relaxed);
    }
}

/// Runs a trial; what guests of earlier ones have shown does not count.
pub fn forget_then(run: impl FnOnce()) {
    SEEN.store(false, Ordering::Relaxed);
    run();
}

/// Returns true if an interrupt of a guest of this trial was delivered twice, and none of an earlier trial: it happens to one guest in
/// a hundred, so twice in a run is no chance.
pub fn take_doubled_interrupt() -> bool {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    SEEN.swap(false, Ordering::Relaxed) && !TAKEN.swap(true, Ordering::Relaxed)
}

/// Returns whether the guest's kernel died of an interrupt that the emulator delivered twice (docs/guide/rig.md).
///
/// The second delivery finds the first instruction of the handler, in the kernel but with the GS base of the user program. The
/// kernel then reads its `current` task (RDX) from the freed memory of its own start, whose poison is 0xcc, and faults on that for
/// ever, on the entry stack. No processor interrupts there: interrupts are off. No wrong DMA has this effect either: it would have
/// to write the frame of an interrupt.
fn shows_doubled_interrupt(console: &str) -> bool {
    let handler_was_interrupted = |line: &str| {
        line.contains("? asm_sysvec_") && line.rsplit_once("+").is_some_and(|(_, at)| is_end(at))
    };
    console.contains("</ENTRY_TRAMPOLINE>")
        && console.contains("RIP: 0010:irqentry_enter+")
        && console.contains("RDX: cccccccccccccccc ")
        && console.lines().any(handler_was_interrupted)
}

/// Returns true if a CPU of the guest is stuck at the third level of interrupts from idle: the second delivery found the handler itself,
/// where interrupts are off, and now waits for a lock that the first one holds. The kernel's report of the RCU stall has the level
/// (`idle=…/0/0x5`: 1 and 2 for each further one). Without such a fault the deepest is the second, an interrupt of a softirq.
fn shows_interrupted_handler(console: &str) -> bool {
    let level = |line: &str| {
        let mut parts = line.split_once("idle=")?.1.split_whitespace().next()?.split('/').skip(1);
        let (nesting, level) = (parts.next()?, parts.next()?.strip_prefix("0x")?);
        (nesting == "0").then(|| u64::from_str_radix(level, 16).ok())?
    };
    console.lines().filter(|line| line.contains("rcu:")).filter_map(level).any(|level| level >= 5)
}

/// Returns whether `at`, an offset in a function and the function's length, is the end of the function: the start of the next.
fn is_end(at: &str) -> bool {
    at.trim_end().split_once('/').is_some_and(|(offset, length)| offset == length)
}

/// The trial of this module: recognises the consoles of two such guests, and none that differs in one of the signs.
pub fn doubled_interrupt_is_recognised() {
    let stall = |idle: &str| {
        format!("[   59.648216] rcu: \t0-...0: (82 ticks this GP) idle={idle} softirq=531/533 fqs=414")
    };
    assert!(shows_interrupted_handler(&stall("c814/0/0x5")));
    for other in ["c814/0/0x3", "c814/0/0x1", "c815/1/0x4000000000000000", "c814/0/5", "c814"] {
        assert!(!shows_interrupted_handler(&stall(other)), "{other}");
    }
    let console = "\
[   37.077]  ? sysvec_apic_timer_interrupt+0xa/0x70
[   37.152]  ? asm_sysvec_apic_timer_interrupt+0x16/0x20
[   37.265]  ? asm_sysvec_spurious_apic_interrupt+0x20/0x20
[   37.347]  </ENTRY_TRAMPOLINE>
[   37.465] RIP: 0010:irqentry_enter+0x1d/0x2b
[   37.466] RDX: cccccccccccccccc RSI: 0000000000000000 RDI: fffffe0000002098
[   37.468] Kernel panic - not syncing: Fatal exception in interrupt";
    assert!(shows_doubled_interrupt(console));
    for (sign, other) in [
        ("+0x20/0x20", "+0x1f/0x20"),
        ("ENTRY_TRAMPOLINE", "TASK"),
        ("irqentry_enter+0x1d", "exc_general_protection+0x15"),
        ("RDX: cccccccccccccccc", "RDX: ffff888003402000"),
    ] {
        assert!(console.contains(sign));
        assert!(!shows_doubled_interrupt(&console.replace(sign, other)), "without {sign}");
    }
}
