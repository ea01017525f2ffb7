//! Who is served next: one request of each client in turn, however many one of them has brought. No threads, no clock.

use std::collections::VecDeque;

/// Who asks: the number of the key in its file, or the address where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Client(pub String);

/// A bounded queue that is fair between clients.
#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    /// in the order of their turns; none is empty
    clients: VecDeque<(Client, VecDeque<(u64, T)>)>,
    len: usize,
    bound: usize,
}

impl<T> FairQueue<T> {
    /// Of at most `bound` requests, of which one client has half.
    pub(crate) fn new(bound: usize) -> FairQueue<T> {
        FairQueue { clients: VecDeque::new(), len: 0, bound }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds a request; gives it back where there is no room.
    pub(crate) fn push(&mut self, client: &Client, id: u64, item: T) -> Result<(), T> {
        let own = self.clients.iter_mut().find(|(c, _)| c == client);
        let most = self.bound.div_ceil(2);
        if self.len >= self.bound || own.as_ref().is_some_and(|(_, items)| items.len() >= most) {
            return Err(item);
        }
        match own {
            Some((_, items)) => items.push_back((id, item)),
            None => self.clients.push_back((client.clone(), VecDeque::from([(id, item)]))),
        }
        self.len += 1;
        Ok(())
    }

    /// The next one; its client's next turn comes when all others have had theirs.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let (client, mut items) = self.clients.pop_front()?;
        let (_, item) = items.pop_front()?;
        self.len -= 1;
        if !items.is_empty() {
            self.clients.push_back((client, items));
        }
        Some(item)
    }

    /// Takes a request out again, if it still waits.
    pub(crate) fn remove(&mut self, id: u64) -> Option<T> {
        let found = self
            .clients
            .iter()
            .enumerate()
            .find_map(|(c, (_, items))| items.iter().position(|(other, _)| *other == id).map(|i| (c, i)));
        let (c, i) = found?;
        let items = &mut self.clients[c].1;
        let (_, item) = items.remove(i)?;
        if items.is_empty() {
            self.clients.remove(c);
        }
        self.len -= 1;
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client(name: u8) -> Client {
        Client(name.to_string())
    }

    #[test]
    fn clients_take_turns_and_none_fills_the_queue() {
        let mut queue = FairQueue::new(6);
        for id in 0..3 {
            queue.push(&client(1), id, id).unwrap();
        }
        assert_eq!(queue.push(&client(1), 3, 3), Err(3), "half of it is the most that one has");
        queue.push(&client(2), 10, 10).unwrap();
        queue.push(&client(3), 20, 20).unwrap();
        assert_eq!(queue.remove(1), Some(1));
        assert_eq!(queue.remove(1), None);
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [0, 10, 20, 2]);
        assert_eq!(queue.len(), 0);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_each_client_s_own_keep_their_order(ops in proptest::collection::vec((0u8..4, 0u8..3), 0..80)) {
            let mut queue = FairQueue::new(8);
            let (mut waiting, mut next) = (Vec::new(), 0u64);
            for (who, op) in ops {
                match op {
                    0 => { if let Some((who, id)) = queue.pop() {
                        let first = waiting.iter().position(|w: &(u8, u64)| w.0 == who).unwrap();
                        prop_assert_eq!(waiting.remove(first), (who, id));
                    } }
                    1 => { if let Some(&(who, id)) = waiting.last() {
                        prop_assert_eq!(queue.remove(id), Some((who, id)));
                        waiting.pop();
                    } }
                    _ => {
                        next += 1;
                        if queue.push(&client(who), next, (who, next)).is_ok() { waiting.push((who, next)); }
                    }
                }
                prop_assert_eq!(queue.len(), waiting.len());
                prop_assert!(waiting.len() <= 8);
            }
        }
    }
}
