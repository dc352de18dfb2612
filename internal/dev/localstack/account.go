//go:build unix

package localstack

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is the unprivileged user that a server runs as when this process is root:
// Postgres refuses to run as root, and RabbitMQ does not need it. A nil account means
// the current user.
type account struct{ uid, gid uint32 }

// serverAccount returns the first of the named users that exists, falling back to
// nobody, or nil if this process is not root.
func serverAccount(names ...string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range append(names, "nobody") {
		found, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(found.Uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parse uid of %s: %w", name, err)
		}
		gid, err := strconv.ParseUint(found.Gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parse gid of %s: %w", name, err)
		}
		return &account{uid: uint32(uid), gid: uint32(gid)}, nil
	}
	return nil, fmt.Errorf("find an unprivileged user for the servers: none of %v nor nobody exists", names)
}

func (a *account) credential() *syscall.Credential {
	if a == nil {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid}
}

// own hands a file or folder to the account.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, int(a.uid), int(a.gid))
}

// reaches reports whether the account may enter the folder. Trying it is simpler than
// repeating the kernel's rules about every parent folder.
func (a *account) reaches(dir string) bool {
	if a == nil {
		return true
	}
	cmd := exec.Command("/bin/sh", "-c", `cd "$1"`, "sh", dir)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.credential()}
	return cmd.Run() == nil
}

// placeData makes the folder for the data of the servers and returns its path.
//
// Normally it is a subfolder of home. But root's checkouts are often below a folder
// with mode 0700, which the accounts of the servers cannot enter. Then it is in a
// folder for temporary files, under a name derived from home so that the next start
// finds it again, and data of the dev profile is only as durable as that folder.
func placeData(home string, accounts ...*account) (string, error) {
	name := fmt.Sprintf("localstack-%d-%.6x", os.Geteuid(), sha256.Sum256([]byte(home)))
	var errs []error
	for _, dir := range []string{
		filepath.Join(home, "servers"),
		filepath.Join(os.TempDir(), name),
		filepath.Join("/var/tmp", name),
	} {
		if err := makeOwn(dir); err != nil {
			errs = append(errs, err)
			continue
		}
		if reachable(dir, accounts) {
			return dir, nil
		}
		// Remove deletes only an empty folder, and keeps data that the servers cannot reach any more.
		_ = os.Remove(dir)
		errs = append(errs, fmt.Errorf("the servers' users cannot enter %s", dir))
	}
	return "", fmt.Errorf("place data: %w", errors.Join(errs...))
}

// makeOwn makes a folder that others may enter. It refuses a folder of another user,
// for instance in /tmp.
func makeOwn(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s exists and belongs to another user", dir)
	}
	return os.Chmod(dir, 0o755) // despite the umask
}

func reachable(dir string, accounts []*account) bool {
	for _, account := range accounts {
		if !account.reaches(dir) {
			return false
		}
	}
	return true
}
