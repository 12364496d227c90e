//! Relays as processes, and devices that meet there.
