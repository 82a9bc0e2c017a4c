//! Why the bus did not do what it was asked for.

use super::store::StoreError;

/// The delivery protocol's errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Too many publishers at once; nothing was published.
    Busy,
    /// The first request with this idempotency key may still be at work.
    OnceUndecided,
    /// The first request with this idempotency key was longer than the TTL ago: nobody can tell what became of it.
    OnceExpired,
    /// An earlier request with this idempotency key had another body.
    OnceDiffers,
    /// The store failed or was late while publishing: the message may have been published or not. With the cause.
    OutcomeUnknown(String),
    /// The store could not be used; nothing was published.
    Store(StoreError),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        Error::Store(error)
    }
}
