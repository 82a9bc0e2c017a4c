//! Publishers on one bus at a time go together: while a claim is under way, those who come form the next group, which gets
//! one slot. Alone they would only refuse each other's claims, again and again, and wait longer each time.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::hub::Hubs;
use crate::bus::name::Place;
use crate::bus::{self, IdempotencyKey, Known, Publish};
use crate::limits;
use crate::stores::pooled::{Address, Pooled, Stores};

/// The buses that somebody publishes on.
pub struct Publishers {
    stores: Stores,
    hubs: Rc<Hubs>,
    buses: RefCell<HashMap<Place, Rc<Queue>>>,
}

/// What waits to be published on a bus.
#[derive(Default)]
struct Queue {
    waiting: RefCell<VecDeque<Waiting>>,
}

/// A request of its own, as it outlives the connection that brought it.
struct Waiting {
    user: u64,
    messages: Vec<Vec<u8>>,
    /// An idempotency key's name, token and TTL.
    key: Option<(String, u64, u32)>,
    ttl: u32,
    answer: oneshot::Sender<Result<Vec<u64>, bus::Error>>,
}

impl Waiting {
    fn bytes(&self) -> usize {
        self.messages.iter().map(|message| limits::SLOT_MESSAGE + message.len()).sum()
    }

    fn publish(&self) -> Publish<'_> {
        let key = self.key.as_ref().map(|(name, token, ttl)| IdempotencyKey { name, token: *token, ttl: *ttl });
        Publish { user: self.user, messages: self.messages.iter().map(|message| &message[..]).collect(), key }
    }
}

impl Publishers {
    /// None yet.
    pub fn new(stores: Stores, hubs: Rc<Hubs>) -> Publishers {
        Publishers { stores, hubs, buses: RefCell::default() }
    }

    /// Publishes on a bus, for `ttl` seconds.
    ///
    /// # Errors
    /// As [`bus::publish`].
    pub async fn publish(
        self: &Rc<Publishers>,
        address: Address,
        publish: Publish<'_>,
        ttl: u32,
    ) -> Result<Vec<u64>, bus::Error> {
        let (sender, answer) = oneshot::channel();
        let waiting = Waiting {
            user: publish.user,
            messages: publish.messages.into_iter().map(<[u8]>::to_vec).collect(),
            key: publish.key.map(|key| (key.name.into(), key.token, key.ttl)),
            ttl,
            answer: sender,
        };
        let queue = self
            .buses
            .borrow_mut()
            .entry(address.place())
            .or_insert_with_key(|place| {
                let queue = Rc::<Queue>::default();
                spawn_local(self.clone().serve(address.clone(), place.clone(), queue.clone()));
                queue
            })
            .clone();
        queue.waiting.borrow_mut().push_back(waiting);
        answer.await.unwrap_or_else(|_| Err(bus::Error::OutcomeUnknown("the process ends".into())))
    }

    /// Publishes one group after the other, until nothing waits. What a claim knows of `last` is the next one's, on the same
    /// connection: on another, memcached may have restarted.
    async fn serve(self: Rc<Publishers>, address: Address, place: Place, queue: Rc<Queue>) {
        let mut kept: Option<(Pooled, Known)> = None;
        loop {
            let group = queue.next_group();
            if group.is_empty() {
                self.buses.borrow_mut().remove(&place);
                return;
            }
            let kept_open = kept.take().filter(|(store, _)| store.is_open());
            let (mut store, known) = kept_open.unwrap_or_else(|| (self.stores.open(address.clone()), None));
            store.renew();
            let mut claim = Box::pin(self.clone().publish_group(place.clone(), store, known, group));
            match timeout(limits::PUBLISH_LOCK, &mut claim).await {
                Ok(left) => kept = Some(left),
                // Where the store is silent, no publisher waits for others' time-outs: each group goes by itself, as from
                // another process.
                Err(_) => {
                    let groups = std::iter::from_fn(|| Some(queue.next_group()).filter(|group| !group.is_empty()));
                    spawn_local(claim);
                    for group in groups {
                        let store = self.stores.open(address.clone());
                        spawn_local(self.clone().publish_group(place.clone(), store, None, group));
                    }
                }
            }
        }
    }

    async fn publish_group(
        self: Rc<Publishers>,
        place: Place,
        mut store: Pooled,
        mut known: Known,
        group: Vec<Waiting>,
    ) -> (Pooled, Known) {
        let (ttl, publishes) = (group[0].ttl, group.iter().map(Waiting::publish).collect());
        let answers = bus::publish_group(&mut store, publishes, ttl, &mut known).await;
        if answers.iter().any(Result::is_ok) {
            self.hubs.published(&place);
        }
        for (waiting, answer) in group.into_iter().zip(answers) {
            let _gone = waiting.answer.send(answer);
        }
        (store, known)
    }
}

impl Queue {
    /// What goes together from the front of the queue: as much as fits a slot, with one TTL, each idempotency key once.
    fn next_group(&self) -> Vec<Waiting> {
        let mut queue = self.waiting.borrow_mut();
        let (mut group, mut messages, mut bytes) = (Vec::<Waiting>::new(), 0, 0);
        while let Some(next) = queue.front() {
            messages += next.messages.len() as u64;
            bytes += next.bytes();
            let differs = |other: &Waiting| other.ttl != next.ttl || next.key.is_some() && is_same_key(other, next);
            let fits = messages <= limits::SLOT_MESSAGES && bytes <= limits::SLOT_BYTES && !group.iter().any(differs);
            if !group.is_empty() && !fits {
                break;
            }
            group.extend(queue.pop_front());
        }
        group
    }
}

fn is_same_key(one: &Waiting, other: &Waiting) -> bool {
    let name = |waiting: &Waiting| waiting.key.as_ref().map(|(name, ..)| name.clone());
    name(one) == name(other)
}
