//! What the bus promises, held to by real servers and browsers, and by a simulation. Each part is a module:
//! `cargo test scenarios::` runs one of them alone.

#[macro_use]
mod fixtures;

mod browser;
mod cli;
mod delivery;
mod demo;
mod dist;
mod docs;
mod examples;
mod failures;
mod fuzz;
mod growing;
mod layout;
mod local_hazards;
mod local_store;
mod month;
mod persistent;
mod sandbox;
mod scenarios;
mod servers;
mod signed;
mod simulation;
mod soak;
mod systems;
