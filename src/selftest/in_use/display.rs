//! Displays and consoles.

use std::path::Path;

use super::descendants::Descendants;
use super::{Host, list_dir, read_optional};

/// Refuses a display that is lit or may show the console, and a serial line that is the console.
pub(super) fn check(host: Host<'_>, dir: &Path, descendants: &Descendants) -> Result<(), String> {
    let driver = std::fs::read_link(dir.join("driver")).ok();
    let is_vfio = driver.is_some_and(|driver| driver.to_string_lossy().contains("vfio"));
    if !is_vfio && read_optional(&dir.join("boot_vga"))?.is_some_and(|boot| boot.trim() == "1") {
        return Err("it is the display that this machine started on: start it on another".to_owned());
    }
    for connector in descendants.of_subsystem("drm") {
        if read_optional(&connector.dir.join("enabled"))?.is_some_and(|state| state.trim() == "enabled") {
            return Err(format!("a display is lit at {}: stop what draws there", connector.name));
        }
    }
    if let Some(buffer) = descendants.of_subsystem("graphics").next() {
        let consoles = host.sysfs.join("class/vtconsole");
        for name in list_dir(&consoles)? {
            let read = |file: &str| read_optional(&consoles.join(&name).join(file));
            let is_frame_buffer = read("name")?.is_some_and(|kind| kind.contains("frame buffer"));
            if is_frame_buffer && read("bind")?.is_none_or(|bound| bound.trim() != "0") {
                let path = consoles.join(&name).join("bind");
                return Err(format!("{} may show the console: echo 0 > {}", buffer.name, path.display()));
            }
        }
    }
    let active = read_optional(&host.sysfs.join("class/tty/console/active"))?.unwrap_or_default();
    for line in descendants.of_subsystem("tty") {
        if active.split_whitespace().any(|name| name == line.name) {
            return Err(format!("{} is a console of this machine: start it without (console=)", line.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::fake::FakeHost;

    #[test]
    fn boot_display_is_in_use_unless_bound_to_vfio() {
        let fake = FakeHost::new();
        fake.write("boot_vga", "0\n");
        assert_eq!(fake.user(), None);
        fake.write("boot_vga", "1\n");
        assert!(fake.user().unwrap().contains("started on"));
        std::os::unix::fs::symlink("../../../bus/pci/drivers/vfio-pci", fake.device().join("driver"))
            .unwrap();
        assert_eq!(fake.user(), None);
    }

    #[test]
    fn display_that_is_lit_or_shows_console_is_in_use() {
        let fake = FakeHost::new();
        let connector = fake.entry("drm", "drm/card0/card0-DP-1", None);
        fs::write(connector.join("enabled"), "disabled\n").unwrap();
        fake.entry("graphics", "graphics/fb0", None);
        assert_eq!(fake.user(), None);
        let console = fake.sysfs().join("class/vtconsole/vtcon1");
        fs::create_dir_all(&console).unwrap();
        fs::write(console.join("name"), "(M) frame buffer device\n").unwrap();
        fs::write(console.join("bind"), "0\n").unwrap();
        assert_eq!(fake.user(), None);
        fs::write(console.join("bind"), "1\n").unwrap();
        assert!(fake.user().unwrap().starts_with("fb0 may show the console: echo 0 > "));
        fs::write(connector.join("enabled"), "enabled\n").unwrap();
        assert!(fake.user().unwrap().starts_with("a display is lit at card0-DP-1"));
    }

    #[test]
    fn serial_console_is_in_use() {
        let fake = FakeHost::new();
        fake.entry("tty", "tty/ttyS4", None);
        let console = fake.sysfs().join("class/tty/console");
        fs::create_dir_all(&console).unwrap();
        fs::write(console.join("active"), "tty0 ttyS40\n").unwrap();
        assert_eq!(fake.user(), None);
        fs::write(console.join("active"), "tty0 ttyS4\n").unwrap();
        assert!(fake.user().unwrap().starts_with("ttyS4 is a console"));
    }
}
