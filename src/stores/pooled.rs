//! The stores of a process that serves many requests: connections and watches are shared.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::decision::{self, Decision};
use super::local::folder::Folder;
use super::local::{Files, Local, OneTask};
use super::memcached::codec::server_for;
use super::memcached::pipelined::{Pipelined, Pool};
use super::watches::{Followed, Watches};
use super::{Either, random_pause, unix_micros};
use crate::bus::name::Place;
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::config::{Config, StoreSetting};
use crate::limits;

/// What the requests of this process share.
#[derive(Clone)]
pub struct Stores {
    pool: Rc<Pool>,
    files: Rc<Files>,
    watches: Rc<Watches>,
    /// A permit for each poll that reads messages.
    reading: Arc<Semaphore>,
}

impl Default for Stores {
    fn default() -> Stores {
        let reading = Arc::new(Semaphore::new(limits::READING));
        Stores { pool: Rc::default(), files: Rc::default(), watches: Rc::default(), reading }
    }
}

/// Which store a bus's settings name.
#[derive(Clone)]
pub struct Address {
    setting: Setting,
    bus: Vec<u8>,
    bytes: u64,
}

#[derive(Clone)]
enum Setting {
    Memcached(String),
    Folder(PathBuf),
    Unset,
}

impl Address {
    /// Of the bus with these settings.
    pub fn of(config: &Config) -> Address {
        let setting = match &config.store {
            StoreSetting::Memcached(servers) => Setting::Memcached(server_for(servers, &config.bus).to_owned()),
            StoreSetting::Folder(folder) => Setting::Folder(folder.clone()),
            StoreSetting::Unset => Setting::Unset,
        };
        Address { setting, bus: config.bus.clone(), bytes: config.store_bytes }
    }

    /// What tells one bus from another.
    pub fn place(&self) -> Place {
        let server = match &self.setting {
            Setting::Memcached(server) => server.clone(),
            Setting::Folder(folder) => folder.to_string_lossy().into_owned(),
            Setting::Unset => String::new(),
        };
        Place { server, bus: self.bus.clone() }
    }
}

impl Stores {
    /// A bus's store, for one request. Nothing is opened or decided before it is used.
    pub fn open(&self, address: Address) -> Pooled {
        Pooled { stores: self.clone(), address, started: Instant::now(), opened: None, reading: None }
    }
}

/// A bus's store, for one request.
pub struct Pooled {
    stores: Stores,
    address: Address,
    started: Instant,
    opened: Option<Either<Pipelined, OneTask>>,
    reading: Option<OwnedSemaphorePermit>,
}

impl Pooled {
    /// Whether another request may go on where this one ends: on a connection of memcached's that still takes requests.
    pub fn is_open(&self) -> bool {
        matches!(&self.opened, Some(Either::Memcached(memcached)) if memcached.is_open())
    }

    /// Begins the time of another request.
    pub fn renew(&mut self) {
        if let Some(Either::Memcached(memcached)) = &mut self.opened {
            memcached.renew();
        }
    }

    /// Notified from now on of each change of the bus, and when it is to be decided anew where it lives; none where the
    /// store does not tell.
    pub async fn follow(&mut self) -> Option<Followed> {
        let path = self.opened().await.ok()?.path()?;
        let watches = &self.stores.watches;
        let decision = match self.address.setting {
            Setting::Unset => Some(watches.follow(&decision::link(&self.address.bus))?),
            _ => None,
        };
        Some(Followed { file: watches.follow(&path)?, decision })
    }

    async fn opened(&mut self) -> Result<&mut Either<Pipelined, OneTask>, StoreError> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => self.locate().await?,
        };
        Ok(self.opened.insert(opened))
    }

    async fn locate(&self) -> Result<Either<Pipelined, OneTask>, StoreError> {
        let Address { setting, bus, bytes } = &self.address;
        let files = &self.stores.files;
        let local = |folder| Either::Local(Local::new(folder, bus, *bytes, OneTask).sharing(files.clone()));
        let memcached = |server: &str| self.stores.pool.open(&Place { server: server.to_owned(), bus: bus.clone() });
        Ok(match setting {
            Setting::Memcached(server) => Either::Memcached(memcached(server)),
            Setting::Folder(folder) => local(Folder::named(folder)),
            Setting::Unset => {
                let ask = async || memcached(decision::MEMCACHED).run(&[Op::Last]).await.map(drop);
                match decision::decision(bus, ask).await? {
                    Decision::Memcached => Either::Memcached(memcached(decision::MEMCACHED)),
                    Decision::Local => local(Folder::own()),
                }
            }
        })
    }
}

impl Store for Pooled {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        self.opened().await?.run(batch).await
    }

    /// No longer than a request may take: then memcached is not asked any more.
    async fn take_room(&mut self) {
        if self.reading.is_none() {
            let left = limits::STORE_DEADLINE.saturating_sub(self.started.elapsed());
            self.reading = timeout(left, self.stores.reading.clone().acquire_owned()).await.ok().and_then(Result::ok);
        }
    }

    /// Most polls find nothing new, and another round trip on an open connection is cheap.
    fn ahead(&self) -> u64 {
        0
    }

    async fn pause(&mut self, longest: Duration) {
        tokio::time::sleep(random_pause(longest)).await;
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}
