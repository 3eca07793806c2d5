//! The things that a process hands over to the next, so that it can take over a domain and its devices: the files, the state of the
//! devices, and the ids that the kernel does not list. Plain data: [`crate::resume`] makes it and takes it over.

use std::os::fd::OwnedFd;

/// The ids and probed properties of a domain that a process needs in order to take it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainIds {
    /// An IOAS of an iommufd.
    Iommufd {
        /// Its object id in the iommufd.
        ioas: u32,
        /// True if the kernel maps by file and offset (`IOMMU_IOAS_MAP_FILE`), as probed when the IOAS was made.
        by_file: bool,
        /// True if the VFIO-compatible unmap works on it, as probed when the IOAS was made.
        compat_unmap: bool,
        /// True if that unmap also cuts mappings, as probed when the IOAS was made.
        cuts: bool,
    },
    /// A VFIO container.
    Type1 {
        /// The maximum number of mappings in it.
        entries: u64,
    },
    /// A domain that ends with its process: an io_uring cannot be handed over, and of the two page tables of a standby
    /// domain ([`crate::Tables::Standby`]) no other process knows which one the devices are attached to.
    Nothing,
}

impl DomainIds {
    /// Encodes the ids as two numbers, for a record in the ledger. The low byte of the first is the kind; bits 8 to 10
    /// are the flags of [`DomainIds::Iommufd`].
    pub fn words(self) -> [u64; 2] {
        match self {
            Self::Nothing => [0, 0],
            Self::Iommufd { ioas, by_file, compat_unmap, cuts } => {
                let bits = [by_file, compat_unmap, cuts]
                    .into_iter()
                    .rev()
                    .fold(0, |bits, bit| bits << 1 | u64::from(bit));
                [1 | bits << 8, ioas.into()]
            }
            Self::Type1 { entries } => [2, entries],
        }
    }

    /// Decodes [`DomainIds::words`]; none for any other numbers.
    pub fn from_words([kind, value]: [u64; 2]) -> Option<Self> {
        match (kind & 0xff, u32::try_from(value)) {
            (0, Ok(0)) if kind == 0 => Some(Self::Nothing),
            (1, Ok(ioas)) if kind >> 11 == 0 => {
                let bit = |bit: u32| kind >> bit & 1 == 1;
                Some(Self::Iommufd { ioas, by_file: bit(8), compat_unmap: bit(9), cuts: bit(10) })
            }
            (2, _) if kind == 2 => Some(Self::Type1 { entries: value }),
            _ => None,
        }
    }
}

/// The files of a domain and its devices that one process hands over to the next, and the state of the devices.
#[derive(Debug, Default)]
pub struct Handover {
    /// The iommufd or the container; none for [`DomainIds::Nothing`].
    pub domain: Option<OwnedFd>,
    /// The groups in the container, each with its number.
    pub groups: Vec<(u32, OwnedFd)>,
    /// The devices, each with its name, in the order of their assignment.
    pub devices: Vec<(String, OwnedFd)>,
    /// The names of the devices that the process had stopped or was about to stop: they may be detached.
    pub stopped: Vec<String>,
    /// The names of the devices whose ATS was read as off after their last attach.
    pub ats_unused: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_encoding_and_other_words_are_rejected() {
        let mut all =
            vec![DomainIds::Nothing, DomainIds::Type1 { entries: u64::MAX }, DomainIds::Type1 { entries: 0 }];
        for bits in 0..8 {
            let [by_file, compat_unmap, cuts] = [1, 2, 4].map(|bit| bits & bit != 0);
            all.push(DomainIds::Iommufd { ioas: u32::MAX, by_file, compat_unmap, cuts });
        }
        for ids in all {
            assert_eq!(DomainIds::from_words(ids.words()), Some(ids));
        }
        for words in [[0, 1], [1, 1 << 32], [1 << 11 | 1, 1], [2 | 1 << 8, 1], [3, 0], [u64::MAX; 2]] {
            assert_eq!(DomainIds::from_words(words), None, "{words:?}");
        }
    }
}
