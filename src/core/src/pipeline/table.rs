//! What goes with a job's number. Numbers come one after the other and leave in about the same order, so a queue with a
//! number for its front does, and costs less than a hash.

use std::collections::VecDeque;

use crate::ids::JobId;

#[derive(Debug)]
pub(super) struct Table<T> {
    /// the number of the front
    first: u64,
    entries: VecDeque<Option<T>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { first: 0, entries: VecDeque::new() }
    }
}

impl<T> Table<T> {
    fn place(&self, id: JobId) -> Option<usize> {
        usize::try_from(id.0.checked_sub(self.first)?).ok()
    }

    /// Numbers are not used twice, and what is older than everything here is not put back.
    pub(super) fn insert(&mut self, id: JobId, value: T) {
        if self.entries.is_empty() {
            self.first = id.0;
        }
        let Some(place) = self.place(id) else { return };
        while self.entries.len() <= place {
            self.entries.push_back(None);
        }
        self.entries[place] = Some(value);
    }

    pub(super) fn get(&self, id: JobId) -> Option<&T> {
        self.entries.get(self.place(id)?)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut T> {
        let place = self.place(id)?;
        self.entries.get_mut(place)?.as_mut()
    }

    pub(super) fn remove(&mut self, id: JobId) -> Option<T> {
        let place = self.place(id)?;
        let value = self.entries.get_mut(place)?.take();
        while let Some(None) = self.entries.front() {
            self.entries.pop_front();
            self.first += 1;
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_until_it_is_taken_out() {
        let mut table = Table::default();
        for id in 5..9 {
            table.insert(JobId(id), id);
        }
        assert_eq!((table.remove(JobId(6)), table.remove(JobId(6))), (Some(6), None));
        assert_eq!(table.remove(JobId(5)), Some(5));
        assert_eq!((table.get(JobId(7)), table.get(JobId(4)), table.get(JobId(9))), (Some(&7), None, None));
        *table.get_mut(JobId(8)).unwrap() = 80;
        assert_eq!((table.remove(JobId(8)), table.remove(JobId(7))), (Some(80), Some(7)));
        assert!(table.entries.is_empty());
        table.insert(JobId(20), 20);
        assert_eq!(table.get(JobId(20)), Some(&20));
    }
}
