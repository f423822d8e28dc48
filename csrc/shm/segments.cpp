#include "segments.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <new>
#include <sstream>

namespace tpkernels {

namespace {

constexpr const char* FOLDER = "/dev/shm";
constexpr int64_t MIN_SLOT_BYTES = 64 << 10;

std::string reason() { return std::strerror(errno); }

std::string link_of(const char* path) {
  std::array<char, 128> text;
  const auto length = readlink(path, text.data(), text.size());
  return length < 0 ? reason() : std::string(text.data(), length);
}

std::string random_token() {
  std::array<unsigned char, 16> bytes;
  TORCH_CHECK(getrandom(bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
              "getrandom: ", reason());
  std::ostringstream text;
  for (const int byte : bytes)
    text << "0123456789abcdef"[byte >> 4] << "0123456789abcdef"[byte & 15];
  return text.str();
}

// The cores this rank may run on, as one character each.
std::string allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof(set), &set);
  std::string text(CPU_SETSIZE, '0');
  for (int i = 0; i < CPU_SETSIZE; i++)
    if (CPU_ISSET(i, &set)) text[i] = '1';
  return text;
}

// Gathers a value of every rank through the group's store.
class StoreGather {
 public:
  StoreGather(c10::intrusive_ptr<c10d::Store> store, int rank, int size)
      : store_(std::move(store)), rank_(rank), size_(size) {}

  std::vector<std::string> operator()(const std::string& key, const std::string& own) const {
    store_->set(key + "/" + std::to_string(rank_), std::vector<uint8_t>(own.begin(), own.end()));
    std::vector<std::string> all;
    for (int r = 0; r < size_; r++) {
      const auto value = store_->get(key + "/" + std::to_string(r));
      all.emplace_back(value.begin(), value.end());
    }
    return all;
  }

  // Raises the first rank's error on every rank.
  void raise_any(const std::string& key, const std::string& error) const {
    const auto all = (*this)(key, error);
    for (int r = 0; r < size_; r++)
      TORCH_CHECK(all[r].empty(), "the shm transport cannot start: rank ", r, ": ", all[r]);
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  int rank_, size_;
};

void check_one_host(const std::vector<std::string>& hosts) {
  for (size_t r = 1; r < hosts.size(); r++)
    TORCH_CHECK(
        hosts[r] == hosts[0], "the shm transport cannot start: ranks 0 and ", r,
        " share no memory, being on two hosts, in two containers or two network namespaces (",
        hosts[0], "; ", hosts[r], "): take gloo for this group");
}

// `slot_bytes`, halved until all ranks' segments fit into what is free.
int64_t fitting_slot_bytes(int64_t slot_bytes, const std::vector<std::string>& free_bytes) {
  const auto size = static_cast<int64_t>(free_bytes.size());
  int64_t room = std::numeric_limits<int64_t>::max();
  for (const auto& bytes : free_bytes) room = std::min<int64_t>(room, std::stoll(bytes));
  while (slot_bytes > MIN_SLOT_BYTES && size * Ring::bytes_of(slot_bytes) > room) slot_bytes /= 2;
  return slot_bytes;
}

// The message of the error that `step` raises, or "".
std::string error_of(const std::function<void()>& step) {
  try {
    step();
    return "";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace

// It names the booted kernel, its process namespace and the file system. The network namespace
// counts too: whoever gives ranks their own means them to be hosts.
std::string shm_host() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  file >> boot;
  struct stat folder{};
  if (stat(FOLDER, &folder) != 0) return "no " + std::string(FOLDER) + ": " + reason();
  return boot + " " + link_of("/proc/self/ns/pid") + " " + link_of("/proc/self/ns/net") + " " +
         std::to_string(folder.st_dev);
}

int64_t shm_free_bytes() {
  struct statvfs room{};
  return statvfs(FOLDER, &room) == 0 ? static_cast<int64_t>(room.f_bavail) * room.f_frsize : 0;
}

int64_t shm_least_bytes(int size) { return size * Ring::bytes_of(MIN_SLOT_BYTES); }

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

Segments::Segments(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                   int64_t max_slot_bytes)
    : mappings_(size), processes_(size) {
  const StoreGather gather(store, rank, size);
  check_one_host(gather("host", shm_host()));
  // All ranks see the room as it was before any of them took of it.
  slot_bytes_ =
      fitting_slot_bytes(max_slot_bytes, gather("free", std::to_string(shm_free_bytes())));
  const auto token = gather("token", random_token())[0];  // the first rank's is the group's
  File file;
  gather.raise_any("created", error_of([&] { file = create(rank, token); }));
  std::ostringstream own;
  own << getpid() << " " << file.get() << " " << at::get_num_threads() << " " << allowed_cores();
  const auto processes = gather("place", own.str());
  const auto error = error_of([&] { open_all(rank, processes, token); });
  gather.raise_any("opened", error);  // after it nobody needs the descriptors
}

void Segments::open_all(int own_rank, const std::vector<std::string>& processes,
                        const std::string& token) {
  const int size = static_cast<int>(processes.size());
  std::string all_cores;  // that any rank may run on
  for (int r = 0; r < size; r++) {
    std::istringstream text(processes[r]);
    int64_t process, descriptor;
    int threads;
    std::string cores;
    text >> process >> descriptor >> threads >> cores;
    threads_ = std::max(threads_, threads);
    if (r != own_rank) open(r, process, descriptor, token);
    all_cores.resize(cores.size(), '0');
    for (size_t i = 0; i < cores.size(); i++) all_cores[i] = std::max(all_cores[i], cores[i]);
  }
  oversubscribed_ = std::count(all_cores.begin(), all_cores.end(), '1') < size;
}

Segments::Mapping Segments::map(const File& file, int64_t length) {
  void* address =
      mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file.get(), 0);
  TORCH_CHECK(address != MAP_FAILED, "cannot map ", length, " bytes of shared memory: ", reason());
  return {static_cast<char*>(address), [length](char* mapped) { munmap(mapped, length); }};
}

File Segments::create(int rank, const std::string& token) {
  File file(::open(FOLDER, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  TORCH_CHECK(file.get() >= 0, "cannot make a file in ", FOLDER, ": ", reason());
  // Reserved here and now: a page that is not there at the first write to it is a SIGBUS in the
  // midst of training.
  const auto length = Ring::bytes_of(slot_bytes_);
  const int error = posix_fallocate(file.get(), 0, length);
  TORCH_CHECK(error == 0, FOLDER, ": ", std::strerror(error), ": it has ", shm_free_bytes(),
              " bytes free, and the ", mappings_.size(), " ranks need ", mappings_.size() * length,
              ": make room (`mount -o remount,size=1G ", FOLDER,
              "`, `docker run --shm-size=1g`), or take gloo (TPKERNELS_TRANSPORT=gloo)");
  mappings_[rank] = map(file, length);
  auto& header = *new (mappings_[rank].get()) Ring::Header{};
  std::memcpy(header.token, token.data(), std::min(token.size(), sizeof(header.token) - 1));
  return file;
}

void Segments::open(int rank, int64_t process, int64_t descriptor, const std::string& token) {
  const auto path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(descriptor);
  const File file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  TORCH_CHECK(file.get() >= 0, "cannot open the memory of rank ", rank, " at ", path, ": ",
              reason(), " (do the ranks run as one user, in one container?)");
  mappings_[rank] = map(file, Ring::bytes_of(slot_bytes_));
  const auto& header = *reinterpret_cast<Ring::Header*>(mappings_[rank].get());
  TORCH_CHECK(token == header.token, path, " is not the memory of rank ", rank, " of this group");
  processes_[rank] =
      File(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(process), 0)));
  TORCH_CHECK(processes_[rank].get() >= 0, "cannot watch the process of rank ", rank,
              ": pidfd_open: ", reason());
}

std::vector<char*> Segments::addresses() const {
  std::vector<char*> all;
  for (const auto& mapping : mappings_) all.push_back(mapping.get());
  return all;
}

std::vector<int> Segments::processes() const {
  std::vector<int> all;
  for (const auto& process : processes_) all.push_back(process.get());
  return all;
}

}  // namespace tpkernels
