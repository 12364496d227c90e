//! Primitives behind one small interface each; nothing outside this crate names them.

pub(crate) mod aead;
pub(crate) mod hpke;
pub(crate) mod kdf;
