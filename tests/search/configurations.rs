//! The configurations that are searched by every `cargo test`, and those that `tests/long/search` searches.
//!
//! Each search is complete: it covers every order of the actions that the configuration allows. A configuration bounds these:
//! one file of two pages, a conversion or two, a fault, a kill. Time always passes, up to every deadline.

use passgate::gate::{Hitless, OnStuckDma, PageState};
use passgate_backends::Steps;

use crate::action::Ending;
use crate::config::{Config, Conversion};

/// Returns the configuration with two conversions to private: of the first page, and of both. Each is committed.
fn two_conversions(config: Config) -> Config {
    let conversions = vec![Conversion::private(0b01), Conversion::private(0b11)];
    Config { conversions, endings: vec![Ending::Committed], ..config }
}

fn committed(config: Config) -> Config {
    Config { endings: vec![Ending::Committed], ..config }
}

/// Returns the configuration with mappings of two pages, which are split with the device stopped meanwhile.
fn pauses(mut config: Config) -> Config {
    config.piece = 2;
    config.policy.hitless = Hitless::Prefer;
    config.machine.stop_class = Steps::STOP | Steps::DETACH;
    config
}

/// Returns the configuration with a domain whose unmaps may leave operations in flight, and a device that can be drained.
fn tickets(mut config: Config) -> Config {
    config.machine.capabilities.tickets = true;
    config.machine.stop_class = Steps::DRAIN | Steps::DETACH;
    config
}

/// Returns the configuration with a domain that cuts pages out of its mappings.
fn cuts(mut config: Config) -> Config {
    config.piece = 2;
    config.machine.capabilities.cut = true;
    config
}

/// Returns the configuration with a device that has every fence, and a policy that allows them.
fn resets(mut config: Config) -> Config {
    config.policy.on_stuck_dma = OnStuckDma::Reset;
    config.machine.stop_class = Steps::all();
    config
}

fn two_devices(mut config: Config) -> Config {
    config.machine.devices = 2;
    config
}

fn second_connection() -> Vec<Conversion> {
    vec![Conversion { by_second: true, ..Conversion::private(0b10) }]
}

pub fn conversions_with_a_fault() -> Config {
    two_conversions(Config { releases: 1, ..Config::new("two conversions, a fault").with_faults(1) })
}

pub fn death_with_a_fault() -> Config {
    committed(Config { deaths: true, ..Config::new("death, a fault").with_faults(1) })
}

pub fn alias_with_a_fault() -> Config {
    committed(Config { alias: true, removals: 1, ..Config::new("alias, removal, a fault").with_faults(1) })
}

pub fn alias_is_added() -> Config {
    committed(Config { adds_alias: true, removals: 1, ..Config::new("alias added, memory removed") })
}

pub fn pages_become_shared_again() -> Config {
    let back = Conversion { to: PageState::Shared, ..Conversion::private(0b01) };
    let conversions = vec![Conversion::private(0b01), back];
    Config { conversions, ..Config::new("to private and back, a fault").with_faults(1) }
}

pub fn strict_with_a_fault() -> Config {
    two_conversions(Config { releases: 1, ..Config::new("strict, a fault").strict().with_faults(1) })
}

pub fn strict_with_two_devices() -> Config {
    two_devices(Config::new("strict, two devices, a fault").strict().with_faults(1))
}

pub fn restart() -> Config {
    Config { kills: 1, releases: 1, ..Config::new("restart") }
}

pub fn restart_with_a_fault() -> Config {
    let config = Config::new("restart, a fault").with_faults(1);
    committed(Config { kills: 1, releases: 1, released_as: vec![PageState::Private], ..config })
}

pub fn two_restarts() -> Config {
    committed(Config { kills: 2, ..Config::new("two restarts") })
}

pub fn strict_restart() -> Config {
    Config { kills: 1, releases: 1, ..Config::new("strict, restart").strict() }
}

pub fn strict_restart_with_a_fence_that_fails() -> Config {
    let config = Config::new("strict, restart, a fence or an attach that fails").strict().with_faults(1);
    let (map_faults, unmap_faults) = (Vec::new(), Vec::new());
    committed(Config { kills: 1, map_faults, unmap_faults, ..config })
}

pub fn second_connection_dies() -> Config {
    let conversions = second_connection();
    let config = Config::new("second connection, restart");
    committed(Config { kills: 1, second_dies: true, conversions, releases: 1, ..config })
}

pub fn passgate_converts() -> Config {
    let config = Config::new("passgate converts, a fault").with_faults(1);
    Config { deaths: true, releases: 1, ..config }.by_passgate()
}

pub fn passgate_converts_and_restarts() -> Config {
    Config { kills: 1, releases: 1, ..Config::new("passgate converts, restart") }.by_passgate()
}

pub fn pauses_and_restarts() -> Config {
    committed(pauses(Config { kills: 1, ..Config::new("pauses, restart") }))
}

pub fn dma_in_flight() -> Config {
    committed(tickets(Config::new("DMA in flight, two faults")).with_faults(2))
}

pub fn pages_are_cut() -> Config {
    committed(cuts(Config::new("cut, a fault")).with_faults(1))
}

pub fn every_fence() -> Config {
    committed(resets(Config::new("every fence, two faults")).with_faults(2))
}

pub fn calls_in_two_steps() -> Config {
    let config = Config { splits_calls: true, kills: 1, ..Config::new("calls in two steps, restart") };
    committed(config)
}

pub fn batched_events() -> Config {
    committed(Config { batches: true, kills: 1, ..Config::new("batched events, restart") })
}

pub fn file_is_added_and_removed() -> Config {
    let config = Config::new("file added and removed in one batch");
    let conversions = Vec::new();
    Config { batches: true, splits_calls: true, adds_alias: true, removals: 1, conversions, ..config }
}

pub fn closed_in_pieces_with_a_fault() -> Config {
    let config = Config { deaths: true, removals: 1, ..Config::new("closed in pieces, a fault") };
    Config { conversions: Vec::new(), ..config.with_faults(1).in_pieces() }
}

pub fn closed_in_pieces_and_restarted() -> Config {
    committed(Config { kills: 1, removals: 1, ..Config::new("closed in pieces, restart") }.in_pieces())
}

pub fn strict_restart_between_two_conversions() -> Config {
    let config = Config::new("strict, restart between two conversions");
    two_conversions(Config { kills: 1, ..config.strict() })
}

/// Returns the configurations that `tests/long/search` searches, the smallest first.
pub fn larger() -> Vec<Config> {
    let three = || {
        let mut conversions = vec![Conversion::private(0b01), Conversion::private(0b11)];
        conversions.extend(second_connection());
        conversions
    };
    vec![
        Config { kills: 1, releases: 1, ..Config::new("long: restart, a fault").with_faults(1) },
        Config {
            kills: 1,
            deaths: true,
            removals: 1,
            ..Config::new("long: closed in pieces, restart, a fault")
        }
        .with_faults(1)
        .in_pieces(),
        Config {
            deaths: true,
            removals: 1,
            releases: 1,
            ..Config::new("long: death, removal, a fault").with_faults(1)
        },
        Config {
            kills: 1,
            releases: 1,
            ..Config::new("long: strict, restart, a fault").strict().with_faults(1)
        },
        two_conversions(Config { kills: 1, releases: 1, ..Config::new("long: restart, two conversions") }),
        two_conversions(Config {
            kills: 1,
            releases: 1,
            ..Config::new("long: strict, restart, two conversions").strict()
        }),
        Config { kills: 2, releases: 1, ..Config::new("long: strict, two restarts").strict() },
        pauses(Config {
            kills: 1,
            releases: 1,
            deaths: true,
            ..Config::new("long: pauses, restart, a fault").with_faults(1)
        }),
        two_devices(Config {
            kills: 1,
            ..Config::new("long: strict, two devices, restart, a fault").strict().with_faults(1)
        }),
        Config {
            conversions: three(),
            second_dies: true,
            deaths: true,
            ..Config::new("long: three conversions, a fault").with_faults(1)
        },
        resets(Config {
            deaths: true,
            releases: 1,
            ..Config::new("long: every fence, three faults").with_faults(3)
        }),
        tickets(Config { deaths: true, releases: 1, ..Config::new("long: DMA in flight, three faults") })
            .with_faults(3),
        Config {
            splits_calls: true,
            kills: 1,
            deaths: true,
            releases: 1,
            ..Config::new("long: calls in two steps, restart")
        },
        Config {
            batches: true,
            splits_calls: true,
            kills: 1,
            deaths: true,
            removals: 1,
            ..Config::new("long: batched events, restart")
        },
        Config {
            adds_alias: true,
            removals: 1,
            deaths: true,
            ..Config::new("long: alias added, a fault").with_faults(1)
        },
    ]
}

/// Returns the configurations of the random walks, which are too large to be searched.
pub fn walked() -> Vec<Config> {
    let conversions = vec![
        Conversion::private(0b001),
        Conversion::private(0b110),
        Conversion { to: PageState::Shared, ..Conversion::private(0b100) },
        Conversion { by_second: true, ..Conversion::private(0b010) },
        Conversion { by_passgate: true, ..Conversion::private(0b011) },
    ];
    let plain = two_devices(Config {
        pages: 3,
        alias: true,
        conversions,
        kills: u8::MAX,
        deaths: true,
        second_dies: true,
        removals: u8::MAX,
        adds_alias: true,
        releases: u8::MAX,
        repeats: true,
        ..Config::new("walk").with_faults(u8::MAX)
    });
    let strict = Config { name: "walk: strict", ..plain.clone() }.strict();
    let two_steps = Config { name: "walk: calls in two steps", splits_calls: true, ..plain.clone() };
    let pauses = Config { piece: 4, ..pauses(Config { name: "walk: pauses", ..plain.clone() }) };
    let pauses_strict = Config { name: "walk: pauses, strict", ..pauses.clone() }.strict();
    let resets = resets(Config { name: "walk: every fence, batched events", batches: true, ..plain.clone() });
    let batched =
        Config { name: "walk: batched events, calls in two steps", batches: true, ..two_steps.clone() };
    let pieces = Config { name: "walk: closed in pieces", ..batched.clone() }.in_pieces();
    vec![plain, strict, two_steps, batched, pauses, pauses_strict, resets, pieces]
}
